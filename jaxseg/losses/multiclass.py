"""Losses for semantic segmentation with several classes, and the Lovasz hinge for one.

Every multi-class function takes `logits` `B x ... x K`, integer `labels` `B x ...` and `valid`
`B x ...` (the dimensions between are an image's pixels), and returns one float32 value an image,
shape `B`. A pixel counts where `valid` holds and its label lies in 0..K-1, so a void label such as
255 counts nowhere; whatever the logits are there, NaN included. An image without a counting pixel
gives 0 with zero gradients.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax


def _pixels(logits, labels, valid) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Gives logits `B x N x K`, labels `B x N` and the counting pixels, finite behind the mask."""
    if labels.shape != logits.shape[:-1] or valid.shape != labels.shape:
        raise ValueError(
            f"logits {logits.shape} need labels and valid of shape {logits.shape[:-1]}, "
            f"found {labels.shape} and {valid.shape}"
        )
    batch, classes = logits.shape[0], logits.shape[-1]
    labels = jnp.asarray(labels, jnp.int32).reshape(batch, -1)
    inside = jnp.asarray(valid, bool).reshape(batch, -1) & (labels >= 0) & (labels < classes)
    logits = jnp.asarray(logits, jnp.float32).reshape(batch, -1, classes)
    # Before any arithmetic: the gradient of a masked result would still be NaN.
    return jnp.where(inside[..., None], logits, 0.0), jnp.where(inside, labels, 0), inside


def _is_label(labels_BxN: jax.Array, classes: int) -> jax.Array:
    return labels_BxN[..., None] == jnp.arange(classes)


def _true_log_probability(log_p_BxNxK: jax.Array, labels_BxN: jax.Array) -> jax.Array:
    # A masked sum rather than a gather, whose gradient would be a scatter.
    return jnp.where(_is_label(labels_BxN, log_p_BxNxK.shape[-1]), log_p_BxNxK, 0.0).sum(-1)


def _ratio(numerator: jax.Array, denominator: jax.Array) -> jax.Array:
    return numerator / jnp.where(denominator > 0, denominator, 1.0)


def _weighted_mean(values_BxN, class_weights, labels_BxN, inside_BxN) -> jax.Array:
    """`sum values / sum w_label`; the values hold their weights already."""
    weights = 1.0 if class_weights is None else jnp.asarray(class_weights)[labels_BxN]
    total = jnp.where(inside_BxN, values_BxN, 0.0).sum(-1)
    return _ratio(total, jnp.where(inside_BxN, weights, 0.0).sum(-1))


def _cross_entropies(log_p_BxNxK, labels_BxN, class_weights, label_smoothing) -> jax.Array:
    """Weighted and smoothed cross-entropy of each pixel."""
    classes = log_p_BxNxK.shape[-1]
    weights = jnp.ones(classes) if class_weights is None else jnp.asarray(class_weights)
    values = -weights[labels_BxN] * _true_log_probability(log_p_BxNxK, labels_BxN)
    if not label_smoothing:
        return values
    everywhere = -(weights * log_p_BxNxK).sum(-1) / classes
    return (1.0 - label_smoothing) * values + label_smoothing * everywhere


def cross_entropy(
    logits: jax.Array,
    labels: jax.Array,
    valid: jax.Array,
    *,
    class_weights: jax.Array | None = None,
    label_smoothing: float = 0.0,
) -> jax.Array:
    """Softmax cross-entropy in nats, the mean over an image's pixels.

    `class_weights` `K` weigh the pixels by their true class; the sum is divided by the sum of the
    weights of the *image's* pixels (torch divides by that of the batch; equal for one image).
    `label_smoothing` s gives the true class 1 - s + s / K and every other s / K.
    """
    logits, labels, inside = _pixels(logits, labels, valid)
    values = _cross_entropies(jax.nn.log_softmax(logits), labels, class_weights, label_smoothing)
    return _weighted_mean(values, class_weights, labels, inside)


def hard_pixels(
    logits: jax.Array,
    labels: jax.Array,
    valid: jax.Array,
    *,
    threshold: float = 0.7,
    keep: float = 1 / 16,
    class_weights: jax.Array | None = None,
    label_smoothing: float = 0.0,
) -> jax.Array:
    """Online hard-pixel mining (Shrivastava et al., CVPR 2016; for pixels Wu et al. 2016).

    The cross-entropy averaged over the pixels whose true class has a probability below `threshold`,
    but over no less than the hardest share `keep` of an image's pixels (at least one; ties count).
    The other options are those of `cross_entropy`.
    """
    logits, labels, inside = _pixels(logits, labels, valid)
    log_p = jax.nn.log_softmax(logits)
    ease = lax.stop_gradient(jnp.where(inside, _true_log_probability(log_p, labels), jnp.inf))
    least = jnp.ceil(keep * inside.sum(-1, keepdims=True)).astype(jnp.int32)
    least = jnp.clip(least, 1, ease.shape[-1])
    cutoff = jnp.take_along_axis(jnp.sort(ease, -1), least - 1, -1)
    hard = inside & ((ease < jnp.log(threshold)) | (ease <= cutoff))
    values = _cross_entropies(log_p, labels, class_weights, label_smoothing)
    return _weighted_mean(values, class_weights, labels, hard)


def focal(
    logits: jax.Array,
    labels: jax.Array,
    valid: jax.Array,
    *,
    gamma: float = 2.0,
    class_weights: jax.Array | None = None,
) -> jax.Array:
    """Focal loss, `-(1 - p_t)^gamma log p_t` (Lin et al., ICCV 2017, eq. 4), mean of pixels.

    `class_weights` are the paper's alpha, normalised as in `cross_entropy`, which this is at gamma 0.
    """
    logits, labels, inside = _pixels(logits, labels, valid)
    log_p = jax.nn.log_softmax(logits)
    # A power below 1 has no finite derivative at 0, where a saturated pixel lies.
    miss = jnp.maximum(-jnp.expm1(_true_log_probability(log_p, labels)), 1e-12)
    values = miss**gamma * _cross_entropies(log_p, labels, class_weights, 0.0)
    return _weighted_mean(values, class_weights, labels, inside)


def _mean_of_present(values_BxK: jax.Array, present_BxK: jax.Array) -> jax.Array:
    return _ratio(jnp.where(present_BxK, values_BxK, 0.0).sum(-1), present_BxK.sum(-1))


def dice(
    logits: jax.Array, labels: jax.Array, valid: jax.Array, *, smooth: float = 1.0
) -> jax.Array:
    """Soft Dice loss, `1 - (2 |PL| + s) / (|P| + |L| + s)` (Milletari et al. 2016) of each class.

    The mean over the classes that occur in the image's truth; probability given to an absent class
    is missing from the present ones. `smooth` is counted in pixels.
    """
    logits, labels, inside = _pixels(logits, labels, valid)
    probability = jnp.where(inside[..., None], jax.nn.softmax(logits), 0.0)
    truth = _is_label(labels, logits.shape[-1]) & inside[..., None]
    both, predicted = jnp.where(truth, probability, 0.0).sum(1), probability.sum(1)
    true = truth.sum(1)
    loss = 1.0 - _ratio(2.0 * both + smooth, predicted + true + smooth)
    return _mean_of_present(loss, true > 0)


def _lovasz(errors_BxN: jax.Array, foreground_BxN: jax.Array, inside_BxN: jax.Array) -> jax.Array:
    """Lovasz extension of the Jaccard loss at the positive parts of the errors, for each row."""
    key = jnp.where(inside_BxN, -errors_BxN, jnp.inf)
    member = (foreground_BxN & inside_BxN).astype(jnp.int32)
    key, member = lax.sort((key, member), num_keys=1)
    total, hits = member.sum(-1, keepdims=True), jnp.cumsum(member, -1)
    seen = jnp.arange(1, key.shape[-1] + 1)
    missed, union = total - hits, (total + seen - hits).astype(jnp.float32)
    # The differences of 1 - missed / union in closed form: subtracting neighbours that are nearly
    # equal loses all digits of a large image's.
    steps = jnp.where(member == 1, 1.0 / union, missed / (union * jnp.maximum(union - 1.0, 1.0)))
    steps = jnp.where(total > 0, steps, seen == 1)
    return (jnp.where(key < 0, -key, 0.0) * steps).sum(-1)


def lovasz_softmax(logits: jax.Array, labels: jax.Array, valid: jax.Array) -> jax.Array:
    """Lovasz-softmax loss (Berman et al., CVPR 2018, eq. 11-12), for each image.

    The mean over the classes that occur in the image's truth of the Jaccard loss's Lovasz extension
    at the errors `|[label = c] - p_c|`; equal to the mean of 1 - IoU where every p_c is 0 or 1.
    """
    logits, labels, inside = _pixels(logits, labels, valid)
    classes = jnp.arange(logits.shape[-1])

    def one_class(of_class) -> jax.Array:
        number, p_BxN = of_class
        truth = (labels == number) & inside
        errors = jnp.where(truth, 1.0 - p_BxN, p_BxN)
        # Of 150 classes a batch holds a few dozen, and sorting is what takes the time.
        return lax.cond(
            truth.any(), _lovasz, lambda *_: jnp.zeros(len(labels)), errors, truth, inside
        )

    # One class after the other: K sorts at once would hold K times the working memory.
    loss_KxB = lax.map(one_class, (classes, jnp.moveaxis(jax.nn.softmax(logits), -1, 0)))
    present = (_is_label(labels, len(classes)) & inside[..., None]).any(1)
    return _mean_of_present(loss_KxB.T, present)


def lovasz_hinge(logits: jax.Array, labels: jax.Array, valid: jax.Array) -> jax.Array:
    """Binary Lovasz hinge (Berman et al., CVPR 2018, eq. 7-8), for each image.

    `logits`, `labels` (foreground above 0.5) and `valid` have one shape `B x ...`. An image without
    foreground has the hinge loss of its worst pixel.
    """
    batch = logits.shape[0]
    inside = jnp.asarray(valid, bool).reshape(batch, -1)
    foreground = labels.reshape(batch, -1) > 0.5
    logits = jnp.asarray(logits, jnp.float32).reshape(batch, -1)
    logits = jnp.where(inside, logits, 0.0)
    return _lovasz(1.0 - jnp.where(foreground, logits, -logits), foreground, inside)


def _median_frequency(counts_NxK: np.ndarray) -> np.ndarray:
    present = counts_NxK > 0
    pixels_with_class = (present * counts_NxK.sum(1, keepdims=True)).sum(0)
    frequency = counts_NxK.sum(0) / np.maximum(pixels_with_class, 1.0)
    return np.median(frequency[frequency > 0]) / np.where(frequency > 0, frequency, 1.0)


def _inverse_log(counts_NxK: np.ndarray) -> np.ndarray:
    return 1.0 / np.log(1.02 + counts_NxK.sum(0) / counts_NxK.sum())


SCHEMES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "none": lambda counts_NxK: np.ones(counts_NxK.shape[1]),
    "median_frequency": _median_frequency,
    "inverse_log": _inverse_log,
}


def class_weights(pixel_counts_NxK: np.ndarray, scheme: str) -> np.ndarray:
    """Class weights of a training set, on the host.

    Args:
      pixel_counts_NxK: valid pixels of each class in each of N images.
      scheme: "none" (ones); "median_frequency", the median of the frequencies over a class's own,
        which is its share of the pixels of the images where it occurs (Eigen and Fergus, ICCV 2015);
        "inverse_log", 1 / ln(1.02 + share of all pixels) (ENet, Paszke et al. 2016).

    Returns:
      Float32 `K`. A class without any pixel has weight 1 and no part in the median.

    Raises:
      ValueError: an unknown scheme, or counts that are not `N x K`.
    """
    counts = np.asarray(pixel_counts_NxK, np.float64)
    if scheme not in SCHEMES:
        raise ValueError(f"unknown class weights {scheme!r}; allowed are {sorted(SCHEMES)}")
    if counts.ndim != 2:
        raise ValueError(f"pixel counts must be N x K (image, class), found shape {counts.shape}")
    occurs = counts.sum(0) > 0
    if not occurs.any():
        return np.ones(counts.shape[1], np.float32)
    return np.where(occurs, SCHEMES[scheme](counts), 1.0).astype(np.float32)
