"""Self-distillation loss of DINO (Caron et al., ICCV 2021, section 3.1)."""

import jax
import jax.numpy as jnp


def teacher_probabilities(
    teacher: jax.Array, center_K: jax.Array, temperature: jax.Array | float
) -> jax.Array:
    """Centred, sharpened softmax((t - c) / temperature) of logits [..., K], float32, no gradient."""
    teacher = jax.lax.stop_gradient(teacher.astype(jnp.float32))
    return jax.nn.softmax((teacher - center_K) / temperature, axis=-1)


def dino_loss(
    student_VxBxK: jax.Array, probabilities_2xBxK: jax.Array, *, temperature: float
) -> jax.Array:
    """Cross-entropy of the teacher's view i against the student's view v, over all pairs v != i.

    Args:
      student_VxBxK: the student's logits of V >= 2 views; the first two are the global ones.
      probabilities_2xBxK: from `teacher_probabilities`, of the two global views.
      temperature: the student's.

    Returns:
      float32 [B], for each example the mean over its 2 V - 2 pairs.

    The sum over all pairs is one product of sums, less the pairs of equal views; so no array with
    both view axes is made, which matters at K = 65,536.
    """
    views = student_VxBxK.shape[0]
    log_p = jax.nn.log_softmax(student_VxBxK.astype(jnp.float32) / temperature, axis=-1)
    every = (probabilities_2xBxK.sum(0) * log_p.sum(0)).sum(-1)
    same = (probabilities_2xBxK * log_p[:2]).sum((0, -1))
    return -(every - same) / (2 * views - 2)
