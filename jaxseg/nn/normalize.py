"""Pixel statistics that backbones expect."""

import jax
import jax.numpy as jnp

# The statistics that the released weights of DINO, DINOv2 and torchvision were trained with.
NORMALIZATIONS = {
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "none": ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
}


def normalize(image: jax.Array, name: str) -> jax.Array:
    """Images in [0, 1], [..., 3], less the mean and over the deviation of `NORMALIZATIONS[name]`."""
    mean, std = NORMALIZATIONS[name]
    return (image - jnp.asarray(mean)) / jnp.asarray(std)
