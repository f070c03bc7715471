"""A linear classifier of tokens by ridge regression: no learning rate, no steps, one solution.

With a few hundred images of few scenes, gradient descent stops wherever the learning rate and the
number of steps leave it, and the network around it overfits; the regression's minimum is known. Its
scores become logits by linear discriminant analysis: where targets are -1 and 1 and the squared
residual is s^2 in the mean, the log odds of a score r are 2 r / s^2.
"""

from collections.abc import Iterable

import numpy as np


def fit(
    examples: Iterable[tuple[np.ndarray, np.ndarray, np.ndarray]], *, penalty: float
) -> tuple[np.ndarray, np.ndarray]:
    """Fits one linear classifier for each of K outputs.

    Args:
      examples: (features `N x C`, targets `N x K` in [-1, 1], weights `N`, not negative) of images.
      penalty: of the squared weights and bias, relative to the mean square of features and the 1 beside.

    Returns:
      (kernel float32 `C x K`, bias float32 `K`); a product with features gives log odds.

    Raises:
      ValueError: no example has a positive weight.
    """
    squares = products = 0.0
    total, target_squares = 0.0, 0.0
    for features, targets, weights in examples:
        x = np.concatenate([features, np.ones((len(features), 1))], 1).astype(np.float64)
        weighted = x * weights[:, None]
        squares += weighted.T @ x
        products += weighted.T @ targets
        target_squares += (weights[:, None] * targets**2).sum(0)
        total += weights.sum()
    if not total > 0:
        raise ValueError("no training image has a labelled pixel")
    squares, products, target_squares = squares / total, products / total, target_squares / total
    size = len(squares)
    ridge = penalty * np.trace(squares) / size * np.eye(size)
    solution = np.linalg.solve(squares + ridge, products)
    residual = target_squares - 2 * (solution * products).sum(0)
    residual += (solution * (squares @ solution)).sum(0)
    logits = solution * 2.0 / np.maximum(residual, 1e-3)
    return logits[:-1].astype(np.float32), logits[-1].astype(np.float32)
