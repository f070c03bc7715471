"""Rotation prediction on a linear stand-in for the backbone, against loops over `np.rot90`."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxseg.backbones.backbone import backbone
from jaxseg.nn.normalize import NORMALIZATIONS
from jaxseg.tasks import Rotation
from jaxseg.tasks.rotation import RotationViews

SIDE = 8
# The whole square image, as it is: what is left are the rotations.
VIEW = RotationViews(flip=0.0, jitter=0.0, gray=0.0, size=SIDE, scale=(1.0, 1.0))


class _Flat(nn.Module):
    """Features that a loop can compute: one matrix."""

    @nn.compact
    def __call__(self, image, *, train=False, drop_keys_B=None):
        cls = nn.Dense(5, name="matrix")(image.reshape(len(image), -1))
        return {"cls": cls, "patches": image}


def _log_softmax(x):
    x = x - x.max()
    return x - np.log(np.exp(x).sum())


@pytest.mark.parametrize("train", [True, False])
def test_loss_and_accuracy_are_those_of_a_loop(train):
    task = Rotation(backbone(_Flat()), VIEW)
    params = task.init(jax.random.key(0))
    images = np.random.default_rng(0).integers(0, 256, (4, SIDE, SIDE, 3), np.uint8)
    valid = np.array([True, True, False, True])
    batch = {
        "image": jnp.asarray(images),
        "extent": jnp.full((4, 2), SIDE),
        "row": jnp.arange(4),
        "valid": jnp.asarray(valid),
    }
    loss, found = task.loss(
        params, task.init_extra(params), batch, jax.random.key(1), 0, train=train
    )

    mean, deviation = (np.array(x) for x in NORMALIZATIONS["imagenet"])
    losses, hits = [], []
    for image in images[valid]:
        for turns in range(4):
            x = (np.rot90(image / 255.0, turns) - mean) / deviation
            x = x.ravel() @ params["backbone"]["matrix"]["kernel"]
            scores = _log_softmax(x @ params["head"]["kernel"])
            losses.append(-scores[turns])
            hits.append(scores.argmax() == turns)
    assert loss == pytest.approx(np.mean(losses), rel=1e-4)
    assert found["scores"]["rotation_accuracy"] == pytest.approx(np.mean(hits), abs=1e-6)
