"""t-SNE (van der Maaten and Hinton, JMLR 2008) of features over the course of a training."""

from collections.abc import Sequence

import numpy as np

from jaxseg.evaluate.rank import check_features, normalize

_START = 1e-4  # deviation of an initial layout: larger ones keep t-SNE from rearranging it


def tsne(
    snapshots: Sequence[np.ndarray], *, perplexity: float = 30.0, seed: int = 0
) -> list[np.ndarray]:
    """Lays out the features of the same images at several times in the plane.

    t-SNE keeps neighbourhoods, but not place, direction or distance: two runs on nearly the same
    features can differ by a rotation, and clusters swap places. So each snapshot starts from the
    layout of the one before it (the first from its two principal components), shrunk, and is turned
    or mirrored to lie on it as well as it can: what has not changed in the features stays about
    where it was, and the layouts can be compared.

    Args:
      snapshots: [N, D] each, the same N images in the same order; D may differ. They are
        L2-normalised first, since k-NN sees them so.
      perplexity: about how many neighbours count; at most a third of N - 1 is used.
      seed: of scikit-learn's `TSNE`.

    Returns:
      float32 [N, 2] for each.

    Raises:
      ValueError: fewer than 4 images, lengths differ; see `check_features`.
    """
    # Imported here: it takes a second, and only this needs it.
    from sklearn.manifold import TSNE
    from sklearn.utils.extmath import randomized_svd
    from threadpoolctl import threadpool_limits

    arrays = [check_features(x, f"snapshot {i}") for i, x in enumerate(snapshots)]
    count = check_count(arrays)
    perplexity = min(perplexity, (count - 1) / 3)
    layouts: list[np.ndarray] = []
    for x in map(normalize, arrays):
        x = x - x.mean(axis=0)  # Distances between features that are nearly alike keep more digits.
        if layouts:
            start = _start(layouts[-1], seed)
        else:  # The first two principal components, with signs that are always the same.
            left, values, _ = randomized_svd(x, min(2, x.shape[1]), random_state=seed)
            start = _start(left * values, seed)
        model = TSNE(n_components=2, perplexity=perplexity, init=start, random_state=seed)
        # The sums, and so the layout, depend on the number of threads; where other processes want
        # the cores too, several are also several times slower than one.
        with threadpool_limits(1):
            layout = model.fit_transform(x)
        layouts.append(_turn(layout, layouts[-1]) if layouts else layout)
    return layouts


def check_count(arrays: Sequence[np.ndarray]) -> int:
    """The number of images, the same in all arrays [N, D].

    Raises:
      ValueError: it is below 4, or not the same in all.
    """
    counts = [len(x) for x in arrays]
    if not counts or min(counts) != max(counts) or counts[0] < 4:
        raise ValueError(
            f"snapshots of {counts} images: need one or more of the same 4 or more images"
        )
    return counts[0]


def _start(layout_NxC: np.ndarray, seed: int) -> np.ndarray:
    """The layout, of 1 or 2 dimensions, at the size that t-SNE starts from.

    With noise, as collapsed features have no size.
    """
    layout = layout_NxC - layout_NxC.mean(axis=0)
    layout = np.pad(layout, ((0, 0), (0, 2 - layout.shape[1])))
    layout = layout / max(layout.std(axis=0).max(), 1e-6)
    noise = np.random.default_rng(seed).normal(size=layout.shape)
    return (_START * (layout + 0.01 * noise)).astype(np.float32)


def _turn(layout_Nx2: np.ndarray, onto_Nx2: np.ndarray) -> np.ndarray:
    """The layout, centred and turned or mirrored onto another (orthogonal Procrustes)."""
    centred = layout_Nx2 - layout_Nx2.mean(axis=0)
    left, _, right = np.linalg.svd(centred.T @ (onto_Nx2 - onto_Nx2.mean(axis=0)))
    return centred @ (left @ right)
