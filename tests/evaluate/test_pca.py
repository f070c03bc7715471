"""PCA maps against the singular value decomposition, and on features made by hand."""

import numpy as np
import pytest

from jaxseg.evaluate.pca import pca_rgb, principal_axes


def test_axes_as_by_svd():
    x = np.random.default_rng(0).normal(size=(200, 9)) * np.arange(1, 10) + 5
    axes, share = principal_axes(x, 3)
    _, values, expected = np.linalg.svd(x - x.mean(axis=0), full_matrices=False)
    np.testing.assert_allclose(np.abs(axes.T @ expected[:3].T), np.eye(3), atol=1e-9)
    np.testing.assert_allclose(share, (values**2 / (values**2).sum())[:3])
    assert (axes[np.abs(axes).argmax(axis=0), range(3)] > 0).all()
    np.testing.assert_allclose(principal_axes(-x, 3)[0], axes, atol=1e-9)  # Signs are not flipped.


def test_colours_are_the_known_factors_and_one_fit_serves_all_images():
    """Three factors of falling strength in 16 dimensions; the second image lacks the first."""
    rng = np.random.default_rng(0)
    factors = rng.uniform(-1, 1, (2, 8, 8, 3)) * [9, 3, 1]
    factors[1, ..., 0] = -9
    basis, _ = np.linalg.qr(rng.normal(size=(16, 3)))
    rgb, share = pca_rgb(factors @ basis.T + 7)
    rgb = np.stack(rgb)
    assert rgb.shape == (2, 8, 8, 3) and rgb.dtype == np.float32
    assert rgb.min() == 0 and rgb.max() == 1
    for channel in range(3):
        correlation = np.corrcoef(rgb[..., channel].ravel(), factors[..., channel].ravel())[0, 1]
        assert abs(correlation) > 0.98
    first = rgb[1, ..., 0]
    assert first.max() < 0.1 or first.min() > 0.9
    assert share.sum() == pytest.approx(1) and (np.diff(share) < 0).all()


def test_one_stray_patch_does_not_dim_the_rest():
    tokens = np.random.default_rng(0).normal(size=(3, 10, 10, 8))
    tokens[0, 0, 0] = 1000
    rgb, _ = pca_rgb(tokens)
    assert np.stack(rgb[1:]).std(axis=(0, 1, 2)).min() > 0.1


def test_images_of_different_sizes_share_one_fit():
    tokens = np.random.default_rng(0).normal(size=(40, 6))
    one, _ = pca_rgb([tokens.reshape(5, 8, 6)])
    two, _ = pca_rgb([tokens[:12].reshape(3, 4, 6), tokens[12:].reshape(7, 4, 6)])
    np.testing.assert_allclose(
        one[0].reshape(40, 3), np.concatenate([x.reshape(-1, 3) for x in two])
    )


def test_collapsed_features_are_one_colour():
    rgb, share = pca_rgb(np.ones((2, 3, 3, 5), np.float32))
    assert np.isfinite(rgb).all() and np.std(rgb) == 0 and (share == 0).all()


def test_errors():
    with pytest.raises(ValueError, match=r"need \[h, w, D\] with one D of at least 3"):
        pca_rgb(np.zeros((1, 2, 2, 2)))
    with pytest.raises(ValueError, match="tokens: 1 of 4 rows hold NaN or infinity, first row 2"):
        pca_rgb(np.array([1.0, 2, np.nan, 4]).reshape(1, 2, 2, 1).repeat(3, axis=-1))
