"""Trains, evaluates and applies segmenters: see README.md, or `python main.py --help`."""

from jaxseg.cli import main

if __name__ == "__main__":
    main()
