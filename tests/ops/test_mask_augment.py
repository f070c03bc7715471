"""Augmentation: the mask must follow the image, and the default must do nothing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxseg.ops.mask_augment import Augmentation


def _scene(n=8, side=32):
    """Images whose red channel is their mask, so that the two can be compared afterwards."""
    mask = np.zeros((n, side, side), np.uint8)
    mask[:, 6:20, 3:15] = 1
    image = np.zeros((n, side, side, 3), np.float32)
    image[..., 0] = mask
    image[..., 1] = 0.5
    return jnp.array(image), jnp.array(mask)


def test_default_changes_nothing():
    image, mask = _scene()
    new_image, new_mask = Augmentation()(jax.random.key(0), image, mask)
    np.testing.assert_array_equal(new_image, image)
    np.testing.assert_array_equal(new_mask, mask)


def test_flip_mirrors_image_and_mask_together():
    image, mask = _scene()
    new_image, new_mask = Augmentation(flip=0.5)(jax.random.key(1), image, mask)
    mirrored = [bool((new_mask[i] == mask[i, :, ::-1]).all()) for i in range(len(mask))]
    assert any(mirrored) and not all(mirrored)
    np.testing.assert_array_equal(new_image[..., 0], new_mask)


@pytest.mark.parametrize("scale", [(1.0, 2.0), (0.5, 1.0), (2.0, 2.0)])
def test_zoom_moves_mask_with_image(scale):
    image, mask = _scene()
    new_image, new_mask = Augmentation(scale=scale)(jax.random.key(2), image, mask)
    inside = np.asarray(new_mask) != 255
    red = np.asarray(new_image[..., 0]) > 0.5
    agreement = (red == (np.asarray(new_mask) == 1))[inside].mean()
    assert agreement > 0.97  # bilinear and nearest differ by at most the pixels on the edge
    assert inside.all() == (scale[0] >= 1.0)


def test_zoom_two_shows_a_quarter():
    image, mask = _scene(n=64)
    _, new_mask = Augmentation(scale=(2.0, 2.0))(jax.random.key(3), image, jnp.ones_like(mask))
    assert (new_mask == 1).all()
    ramp = jnp.broadcast_to(jnp.linspace(0, 1, 32)[:, None, None], (64, 32, 32, 3))
    new_image, _ = Augmentation(scale=(2.0, 2.0))(jax.random.key(3), ramp, mask)
    spread = np.asarray(new_image[:, -1, 0, 0] - new_image[:, 0, 0, 0])
    np.testing.assert_allclose(spread, 15.5 / 31, atol=0.02)


def test_colour_stays_in_range_and_leaves_the_mask():
    image, mask = _scene()
    change = Augmentation(brightness=0.9, contrast=0.9, saturation=0.9)
    new_image, new_mask = change(jax.random.key(4), image, mask)
    assert new_image.min() >= 0 and new_image.max() <= 1
    assert not np.allclose(new_image, image)
    np.testing.assert_array_equal(new_mask, mask)


def test_examples_do_not_depend_on_their_neighbours():
    image, mask = _scene()
    change = Augmentation(flip=0.5, scale=(0.5, 2.0), brightness=0.3)
    whole, _ = change(jax.random.key(5), image, mask)
    other, _ = change(jax.random.key(5), image.at[1:].set(0.0), mask)
    np.testing.assert_array_equal(whole[0], other[0])
