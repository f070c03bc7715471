"""Computing activations again: the same gradient and statistics, and less is kept."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxseg.backbones import build, contract
from jaxseg.backbones.resnet import ResNetVariant
from jaxseg.backbones.vit import Variant

VARIANTS = [
    Variant("tiny", patch=8, dim=32, depth=3, heads=2, grid=4),
    ResNetVariant("tiny", (2, 1, 1, 1), bottleneck=False, width=8, small_stem=True),
]


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: type(v).__name__)
def test_remat_keeps_less_for_the_same(variant):
    image = jax.random.normal(jax.random.key(0), (4, 32, 32, 3))
    init = jax.jit(build(variant, drop_path=0.5).init)
    variables = init(jax.random.key(1), image[:1])
    keys = jax.random.split(jax.random.key(2), 4)

    def results(remat):
        model = build(variant, drop_path=0.5, remat=remat)

        def loss(params):
            out, changed = contract.apply(
                model,
                {**variables, "params": params},
                image,
                drop_keys_B=keys,
                train=True,
                mutable=["batch_stats"],
            )
            return jnp.sum(out["patches"] ** 2), changed

        # What the backward pass keeps of the forward one are the leaves of the function.
        kept = jax.eval_shape(lambda p: jax.vjp(loss, p, has_aux=True)[1], variables["params"])
        size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(kept))
        return jax.jit(jax.value_and_grad(loss, has_aux=True))(variables["params"]), size

    (plain, much), (again, little) = results(False), results(True)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), plain, again)
    assert little < 0.6 * much
