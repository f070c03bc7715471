"""A linear classifier of tokens by ridge regression: no learning rate, no steps, one solution.

With a few hundred images of few scenes, gradient descent stops wherever the learning rate and the
number of steps leave it, and the network around it overfits; the regression's minimum is known. Its
scores become logits by linear discriminant analysis: where targets are -1 and 1 and the squared
residual is s^2 in the mean, the log odds of a score r are 2 r / s^2.

Where the logits cross zero is another matter: of objects that it was not fitted to a regression finds
too little. So the threshold is that of the best intersection over union on groups of images which were
left out of the fit one by one.
"""

import dataclasses
from collections.abc import Callable

import numpy as np

# So many images, evenly spaced, are enough to find a threshold.
JUDGED = 1000
THRESHOLDS = np.linspace(-1.0, 1.0, 101)


@dataclasses.dataclass
class _Moments:
    """Weighted sums of squares and products, of features with a 1 beside and of targets."""

    squares: np.ndarray | float = 0.0
    products: np.ndarray | float = 0.0
    targets: np.ndarray | float = 0.0
    weight: float = 0.0

    def add(self, x: np.ndarray, targets: np.ndarray, weights: np.ndarray) -> None:
        weighted = x * weights[:, None]
        self.squares = self.squares + weighted.T @ x
        self.products = self.products + weighted.T @ targets
        self.targets = self.targets + weights @ targets**2
        self.weight += weights.sum()


def _solve(groups: list[_Moments], penalty: float) -> tuple[np.ndarray, np.ndarray]:
    """(the regression's solution, each group counting the same; its mean squared residuals)."""
    squares = np.mean([g.squares / g.weight for g in groups], 0)
    products = np.mean([g.products / g.weight for g in groups], 0)
    targets = np.mean([g.targets / g.weight for g in groups], 0)
    size = len(squares)
    ridge = penalty * np.trace(squares) / size * np.eye(size)
    solution = np.linalg.solve(squares + ridge, products)
    residual = targets - 2 * (solution * products).sum(0) + (solution * (squares @ solution)).sum(0)
    return solution, residual


def _ious(scores: np.ndarray, share: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Mean IoU of foreground and background at each of `THRESHOLDS`."""
    edges = np.concatenate([[-np.inf], THRESHOLDS, [np.inf]])
    foreground = np.histogram(scores, edges, weights=share * weights)[0]
    background = np.histogram(scores, edges, weights=(1 - share) * weights)[0]
    missed, right = np.cumsum(foreground)[:-1], np.cumsum(background)[:-1]
    found, wrong = foreground.sum() - missed, background.sum() - right
    ious = []
    if foreground.sum() > 0:
        ious.append(found / (foreground.sum() + wrong))
    if background.sum() > 0:
        ious.append(right / (background.sum() + missed))
    return np.mean(ious, 0)


def fit(
    read: Callable[[int, bool], tuple[np.ndarray, np.ndarray, np.ndarray, int]],
    images: int,
    *,
    penalty: float,
) -> tuple[np.ndarray, np.ndarray]:
    """Fits one linear classifier for each of K outputs.

    Args:
      read: (image i, whether again) -> features `N x C`, shares of foreground `N x K` in [0, 1], weights
        `N`, not negative, and its group: what images share that new ones will not. Groups count the same.
      images: how many there are; each is read once, and most of them again.
      penalty: of the squared weights and bias, relative to the mean square of features and the 1 beside.

    Returns:
      (kernel float32 `C x K`, bias float32 `K`); a product with features gives logits.

    Raises:
      ValueError: no example has a positive weight.
    """

    def example(index, again):
        features, share, weights, group = read(index, again)
        x = np.concatenate([features, np.ones((len(features), 1))], 1).astype(np.float64)
        return x, np.asarray(share, np.float64), np.asarray(weights, np.float64), group

    moments: dict[int, _Moments] = {}
    for i in range(images):
        x, share, weights, group = example(i, False)
        if weights.any():
            moments.setdefault(group, _Moments()).add(x, 2.0 * share - 1.0, weights)
    if not moments:
        raise ValueError("no training image has a labelled pixel")
    solution, residual = _solve(list(moments.values()), penalty)
    # With one group there is nothing unseen to judge by; its own scores have to do.
    unseen = {}
    for group in moments:
        others = [m for g, m in moments.items() if g != group] or list(moments.values())
        unseen[group], _ = _solve(others, penalty)
    judged: dict[int, list[tuple]] = {group: [] for group in moments}
    for i in range(0, images, -(-images // JUDGED)):
        x, share, weights, group = example(i, True)
        if weights.any():
            judged[group].append((x @ unseen[group], share, weights))
    groups = [tuple(map(np.concatenate, zip(*v, strict=True))) for v in judged.values() if v]
    for k in range(solution.shape[1]):
        ious = np.mean([_ious(scores[:, k], share[:, k], w) for scores, share, w in groups], 0)
        solution[-1, k] -= THRESHOLDS[np.argmax(ious)]
    logits = solution * 2.0 / np.maximum(residual, 1e-3)
    return logits[:-1].astype(np.float32), logits[-1].astype(np.float32)
