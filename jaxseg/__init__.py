"""jaxseg: images to masks on self-supervised features, in JAX."""

__version__ = "0.1.0"
