"""Patch features as colours: the first three principal components as red, green and blue."""

from collections.abc import Sequence

import numpy as np

from jaxseg.evaluate.rank import check_features

_ROBUST = (1.0, 99.0)  # percentiles that become 0 and 1: a few stray patches do not dim the rest


def principal_axes(features_NxD: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """The first principal components: (axes [D, count] of length 1, shares of the variance [count]).

    Float64. The sign of an axis is arbitrary; here its largest weight is positive.
    """
    centred = np.asarray(features_NxD, np.float64)
    centred = centred - centred.mean(axis=0)
    values, vectors = np.linalg.eigh(centred.T @ centred)
    values, axes = values[::-1].clip(min=0), vectors[:, ::-1][:, :count]
    largest = np.take_along_axis(axes, np.abs(axes).argmax(axis=0)[None], axis=0)
    return axes * np.sign(largest), values[:count] / max(values.sum(), 1e-30)


def pca_rgb(tokens: Sequence[np.ndarray]) -> tuple[list[np.ndarray], np.ndarray]:
    """Projects patch features to their first three principal components, fitted to all images.

    So one colour means the same in all of them; see `principal_axes` for the signs.

    Args:
      tokens: features [h, w, D] of the patches of each image, D at least 3.

    Returns:
      (float32 [h, w, 3] in [0, 1] of each image, each component's 1st and 99th percentile at 0 and 1;
      float64 [3], the share of the variance that each component holds).

    Raises:
      ValueError: the shape is another, or features are not finite.
    """
    shapes = [np.shape(x) for x in tokens]
    depths = {shape[-1] for shape in shapes if len(shape) == 3 and 0 not in shape}
    if len(depths) != 1 or min(depths) < 3 or any(len(shape) != 3 for shape in shapes):
        raise ValueError(f"tokens have shapes {shapes}: need [h, w, D] with one D of at least 3")
    flat = np.concatenate([np.reshape(x, (-1, np.shape(x)[-1])) for x in tokens])
    flat = check_features(flat, "tokens").astype(np.float64)
    axes, share = principal_axes(flat, 3)
    projected = (flat - flat.mean(axis=0)) @ axes
    low, high = np.percentile(projected, _ROBUST, axis=0)
    rgb = np.clip((projected - low) / np.maximum(high - low, 1e-12), 0, 1)
    ends = np.cumsum([h * w for h, w, _ in shapes])
    parts = np.split(rgb.astype(np.float32), ends[:-1])
    return [part.reshape(h, w, 3) for part, (h, w, _) in zip(parts, shapes, strict=True)], share
