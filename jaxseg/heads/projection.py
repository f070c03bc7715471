"""Projection head of DINO (Caron et al., ICCV 2021, appendix C)."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxseg.backbones.vit import gelu

_init = nn.initializers.truncated_normal(0.02)


class ProjectionHead(nn.Module):
    """Three linear layers, L2 normalisation, and a weight-normalised linear layer without bias.

    Attributes:
      outputs: K, the number of prototypes.
      hidden, bottleneck: widths of the layers before.
      norm_last_layer: keep the gains g of the weight norm at 1 (else they are trained).
      batch_norm: normalise the hidden layers by the batch (the reference's use_bn_in_head): small
        networks and batches then no longer fall to uniform outputs.
      dtype: of the matrix products; norms, and what is returned, are float32.
    """

    outputs: int
    hidden: int = 2048
    bottleneck: int = 256
    norm_last_layer: bool = True
    batch_norm: bool = False
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x_NxD: jax.Array, *, train: bool = True) -> jax.Array:
        """Logits float32 [N, K] of features [N, D]; cosines in [-1, 1] where gains are 1.

        `train` says whether batch norm uses (and updates) the statistics of this batch.
        """
        x = x_NxD
        for i, width in enumerate((self.hidden, self.hidden, self.bottleneck)):
            if i and self.batch_norm:
                x = nn.BatchNorm(
                    use_running_average=not train,
                    momentum=0.9,
                    epsilon=1e-5,
                    dtype=self.dtype,
                    name=f"bn_{2 * i - 2}",
                )(x)
            x = gelu(x) if i else x
            x = nn.Dense(width, dtype=self.dtype, kernel_init=_init, name=f"mlp_{2 * i}")(x)
        x = x.astype(jnp.float32)
        x /= jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-12)
        v = self.param("last_layer_v", _init, (self.bottleneck, self.outputs))
        out = jnp.matmul(
            x.astype(self.dtype), v.astype(self.dtype), preferred_element_type=jnp.float32
        )
        # The norms divide the product, not v: XLA would fuse that division into the product, which
        # then takes fifty times as long on CPUs.
        out /= jnp.maximum(jnp.linalg.norm(v, axis=0), 1e-12)
        if not self.norm_last_layer:
            # A matrix, as in the reference, whose weight decay spares vectors only.
            out *= self.param("last_layer_g", nn.initializers.ones, (1, self.outputs))
        return out
