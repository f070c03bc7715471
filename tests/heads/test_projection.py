"""DINO's projection head against the reference's output."""

import jax
import jax.numpy as jnp
import numpy as np
from shared import shared_path

from jaxseg.heads.projection import ProjectionHead


def test_reference():
    golden = np.load(shared_path("golden/dino_loss.npz"))
    params = {
        f"mlp_{i}": {
            "kernel": golden[f"head.mlp.{i}.weight"].T,
            "bias": golden[f"head.mlp.{i}.bias"],
        }
        for i in (0, 2, 4)
    }
    params["last_layer_v"] = golden["head.last_layer.weight_v"].T
    params["last_layer_g"] = golden["head.last_layer.weight_g"].T
    head = ProjectionHead(64, hidden=64, bottleneck=32, norm_last_layer=False)
    found = head.apply({"params": params}, jnp.asarray(golden["head_in"]))
    np.testing.assert_allclose(found, golden["head_out"], atol=1e-5)


def test_gains_of_one_give_cosines():
    head = ProjectionHead(50, hidden=16, bottleneck=8)
    x = jax.random.normal(jax.random.key(0), (20, 12))
    params = head.init(jax.random.key(1), x)
    assert "last_layer_g" not in params["params"]
    out = head.apply(params, x)
    assert out.shape == (20, 50) and np.abs(out).max() <= 1 + 1e-5
    # Scaling the prototypes changes nothing: only their directions count.
    params["params"]["last_layer_v"] *= 7.0
    np.testing.assert_allclose(head.apply(params, x), out, atol=1e-6)
