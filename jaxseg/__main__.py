"""`python -m jaxseg`, the same as `jaxseg`."""

from jaxseg.cli import main

# Processes that read data import this module too.
if __name__ == "__main__":
    main()
