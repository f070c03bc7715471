"""Attention masks and their Jaccard index on maps made by hand, and on released weights."""

import numpy as np
import pytest
from PIL import Image
from shared import shared_path

from jaxseg.evaluate.attention_maps import (
    attention_jaccard,
    cls_attention,
    head_jaccard,
    keep_mass,
    upsample,
)


def test_keeps_the_fewest_patches_that_hold_the_mass():
    attention = np.array([[0.30, 0.05], [0.40, 0.25]])
    assert keep_mass(attention, 0.6).tolist() == [[True, False], [True, False]]
    assert keep_mass(attention, 0.71).tolist() == [[True, False], [True, True]]
    assert keep_mass(attention * 1e-9, 0.39).tolist() == [[False, False], [True, False]]
    assert keep_mass(attention, 1.0).all()


@pytest.mark.parametrize("mass", [0.1, 0.6, 0.95])
def test_as_the_reference_s_loop(mass):
    """Greedy from the top in slow Python; leading axes are maps of their own."""
    attention = np.random.default_rng(0).gamma(0.5, size=(3, 2, 5, 4))
    kept = keep_mass(attention, mass)
    for index in np.ndindex(3, 2):
        flat, held, chosen = attention[index].ravel(), 0.0, set()
        for i in sorted(range(20), key=lambda i: -flat[i]):
            if held >= mass * flat.sum():
                break
            held += flat[i]
            chosen.add(i)
        assert set(np.flatnonzero(kept[index])) == chosen


def test_cls_attention_drops_cls_and_registers():
    registers, h, w = 4, 2, 3
    n = 1 + registers + h * w
    attention = np.arange(2 * 5 * n * n, dtype=np.float32).reshape(2, 5, n, n)
    maps = cls_attention(attention, (h, w))
    assert maps.shape == (2, 5, 2, 3)
    assert maps[1, 3].ravel().tolist() == attention[1, 3, 0, 5:].tolist()
    assert (cls_attention(attention[:, :, :1], (h, w)) == maps).all()
    with pytest.raises(ValueError, match=r"need \[B, heads, Q, N\] with N > 4\*3 patches"):
        cls_attention(attention, (4, 3))


def test_upsampling_is_by_the_nearest_patch():
    mask = np.array([[1, 0, 0], [0, 1, 1]], bool)
    np.testing.assert_array_equal(upsample(mask, (4, 9)), mask.repeat(2, 0).repeat(3, 1))
    assert upsample(mask, (3, 2)).shape == (3, 2)  # Sizes need not be multiples.


def _map(*patches, shape=(4, 4)):
    """All mass evenly on some patches."""
    attention = np.zeros(shape)
    for row, column in patches:
        attention[row, column] = 1
    return attention


def test_jaccard_by_hand_without_void_pixels():
    mask = np.zeros((8, 8), np.uint8)
    mask[0:4, 0:4] = 1  # 4 patches of 2x2
    inside = _map((0, 0), (0, 1), (1, 0), (1, 1))
    half = _map((0, 0), (0, 1), (3, 2), (3, 3))
    beside = _map((3, 3), (3, 2))
    scores = head_jaccard(np.stack([inside, half, beside]), mask, mass=1.0)
    np.testing.assert_allclose(scores, [1, 2 / 6, 0])
    mask[4:, :] = 255  # The wrong patches of `half` are no longer counted.
    scores = head_jaccard(np.stack([inside, half, beside]), mask, mass=1.0)
    np.testing.assert_allclose(scores, [1, 2 / 4, 0])


def test_best_head_is_chosen_for_each_image():
    masks = [np.zeros((4, 4), np.uint8) for _ in range(3)]
    masks[0][0, 0] = masks[1][3, 3] = 1  # The last has no foreground and does not count.
    maps = np.stack([_map((0, 0)), _map((3, 3))])
    result = attention_jaccard(np.stack([maps] * 3), masks, mass=1.0)
    assert result["best_head"] == 1 and result["per_head"] == [0.5, 0.5]
    assert result["mean_attention"] == 0.5  # Both patches are kept, one of them right.
    assert result["whole_image"] == 1 / 16 and result["images"] == 2


def test_errors():
    maps, mask = np.ones((1, 2, 3, 3)), np.ones((6, 6), np.uint8)
    for wrong in (-maps[0], np.zeros((2, 3, 3)), maps[0] * np.nan):
        with pytest.raises(ValueError, match="finite, not negative, and not 0 everywhere"):
            keep_mass(wrong)
    for mass in (0.0, 1.1):
        with pytest.raises(ValueError, match=f"mass is {mass}"):
            keep_mass(maps, mass)
    with pytest.raises(ValueError, match="1 attention maps for 2 masks"):
        attention_jaccard(maps, [mask, mask])
    with pytest.raises(ValueError, match="none of 1 masks has foreground"):
        attention_jaccard(maps, [mask * 0])


def test_released_weights_look_at_the_object():
    """Attention of a DINOv2 ViT-S/14 finds the animal far better than chance; noise does not."""
    import jax

    from jaxseg import backbones
    from jaxseg.backbones import pretrained

    path = shared_path("weights/dinov2_vits14_derived_fp16.pth")
    images, masks = [], []
    for name in ("blackswan", "cows", "dog", "goat"):
        folder = shared_path(f"data/obj_seg/test/{name}")
        image, mask = (sorted((folder / kind).iterdir())[0] for kind in ("images", "annotations"))
        image = Image.open(image).convert("RGB").resize((336, 196), Image.Resampling.BICUBIC)
        images.append(np.asarray(image, np.float32) / 255)
        masks.append(np.asarray(Image.open(mask).convert("L")) // 255)  # at its own 854x480
    released = pretrained.load(path)
    normalised = (np.stack(images) - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    model = backbones.build(released.variant)
    run = jax.jit(lambda params, x: model.apply({"params": params}, x, attention=True))
    maps = cls_attention(run(released.params, normalised)["attention"], (14, 24))
    result = attention_jaccard(maps, masks)
    assert result["best_head"] > max(0.4, 3 * result["whole_image"])
    noise = attention_jaccard(np.random.default_rng(0).random(maps.shape), masks)
    assert result["best_head"] > 3 * noise["best_head"]
