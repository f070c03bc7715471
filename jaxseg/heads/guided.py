"""The library's own head: object context on the token grid, then a light decoder led by the image.

A frozen backbone says *what* is where, on a grid 8 or 16 times too coarse; the image says *where* it
ends. The context part works on tokens only. The decoder adds the image back level by level, as in
U-Net, but in space-to-depth form: full resolution is never convolved, its 2x2 blocks are channels at
half of it, so that a step stays affordable on a CPU.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange

from jaxseg.heads.pac import stages
from jaxseg.heads.solved import Solved
from jaxseg.nn.dense import Dense
from jaxseg.options import option


def space_to_depth(x_BxHxWxC: jax.Array) -> jax.Array:
    """Moves 2x2 blocks to channels: `B x H/2 x W/2 x 4C`, H and W even."""
    return rearrange(x_BxHxWxC, "b (h i) (w j) c -> b h w (i j c)", i=2, j=2)


def depth_to_space(x_BxHxWxC: jax.Array, factor: int = 2) -> jax.Array:
    """Inverse of `space_to_depth`: `B x 2H x 2W x C/4` for a factor of 2."""
    return rearrange(x_BxHxWxC, "b h w (i j c) -> b (h i) (w j) c", i=factor, j=factor)


def double(x_BxHxWxC: jax.Array) -> jax.Array:
    """Bilinear upsampling by 2 (half-pixel centres): each result is 3/4 of one pixel, 1/4 of the next.

    Slices instead of `resize_bilinear`'s matrices: on high resolutions that is several times faster.
    """
    x = x_BxHxWxC
    for axis in (1, 2):
        n = x.shape[axis]
        first, last = (jax.lax.slice_in_dim(x, i, i + 1, axis=axis) for i in (0, n - 1))
        padded = jnp.concatenate([first, x, last], axis)
        before, after = (jax.lax.slice_in_dim(padded, i, i + n, axis=axis) for i in (0, 2))
        pair = jnp.stack([0.75 * x + 0.25 * before, 0.75 * x + 0.25 * after], axis + 1)
        x = pair.reshape(*x.shape[:axis], 2 * n, *x.shape[axis + 1 :])
    return x


def standardise(features_BxhxwxC: jax.Array) -> jax.Array:
    """Each token less its mean and over its deviation, as float32."""
    x = features_BxhxwxC.astype(jnp.float32)
    x = x - x.mean(-1, keepdims=True)
    return x * jax.lax.rsqrt((x * x).mean(-1, keepdims=True) + 1e-6)


def relative(standardised_BxhxwxC: jax.Array) -> jax.Array:
    """Tokens less the mean of their image: what differs within it, whatever the image is about."""
    return standardised_BxhxwxC - standardised_BxhxwxC.mean((1, 2), keepdims=True)


def _prior_inputs(features_BxhxwxC: jax.Array) -> jax.Array:
    return relative(standardise(features_BxhxwxC))


class TokenContext(nn.Module):
    """Standardised tokens seen among their neighbours: `B x h x w x width`.

    Every token is projected; residual dilated 3x3 convolutions follow.

    Attributes:
      width: channels, a multiple of 8.
      dilations: of the residual convolutions, one each.
      dropout: of whole feature channels in training, the same in all tokens of an image.
    """

    width: int = 96
    dilations: tuple[int, ...] = (1, 2, 4)
    dropout: float = 0.1

    @nn.compact
    def __call__(self, tokens_BxhxwxC: jax.Array, *, train: bool = False) -> jax.Array:
        drop = nn.Dropout(self.dropout, broadcast_dims=(1, 2), deterministic=not train)
        x = drop(tokens_BxhxwxC)
        x = nn.gelu(nn.GroupNorm(8, name="norm")(Dense(self.width, name="project")(x)))
        for i, d in enumerate(self.dilations):
            y = nn.Conv(self.width, (3, 3), kernel_dilation=(d, d), name=f"dilated{i}")(x)
            x = x + nn.gelu(nn.GroupNorm(8, name=f"norm{i}")(y))
        return x


class GuidedDecoder(nn.Module):
    """Segmentation head: token context, then an image-guided decoder in space-to-depth form.

    The logits are the context's own, upsampled bilinearly, plus a correction by the decoder which
    starts at zero; so the context learns from the first step, and the decoder only sharpens. With a
    `prior` the context's logits are added to those of a linear classifier of tokens relative to their
    image, which is not trained with the rest but solved for (`train.ridge`).

    Attributes:
      outputs: number of logits per pixel, K.
      width: channels of the context.
      dilations: of the context's convolutions.
      dropout: of feature channels, in training.
      guide_widths: channels at 1/2, 1/4, 1/8, ... of the image; the last one repeats.
      prior: penalty of the linear prior, 0 for none; its parameters, `prior`, start at zero.
    """

    outputs: int = 1
    width: int = option(96, "channels of the context", low=8, high=2**16, multiple=8)
    dilations: tuple[int, ...] = (1, 2, 4)
    dropout: float = option(0.1, "of feature channels", low=0, high=0.99)
    guide_widths: tuple[int, ...] = option(
        (16, 32, 64), "channels at 1/2, 1/4, ... of the image", low=1, whole=True, least=1
    )
    prior: float = option(
        0.0,
        "penalty of a linear classifier of frozen features, solved for first; 0 = none",
        low=0,
        high=1e3,
    )

    @property
    def solved(self) -> Solved | None:
        """The prior, where there is one."""
        return Solved("prior", _prior_inputs, self.prior) if self.prior else None

    @nn.compact
    def __call__(
        self, features_BxhxwxC: jax.Array, image_BxHxWx3: jax.Array, *, train: bool = False
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Logits `B x H x W x K` float32 of an image in [0, 1] whose sizes are h and w times 2^n.

        Returns:
          (logits, {"context": the context's logits `B x h x w x K`}).

        Raises:
          ValueError: if the sizes do not differ by the same power of two.
        """
        n = stages(features_BxhxwxC, image_BxHxWx3)
        tokens = standardise(features_BxhxwxC)
        x = TokenContext(self.width, self.dilations, self.dropout, name="context")(
            tokens, train=train
        )
        context = Dense(self.outputs, name="classify")(x)
        if self.prior:
            zero = nn.initializers.zeros
            prior = Dense(self.outputs, kernel_init=zero, name="prior")(relative(tokens))
            # In training half of the images go without: the prior fits those best which it was
            # solved for, and would leave the rest of the head little to learn. Where it is always
            # there it counts half, as in the original dropout (Srivastava et al., JMLR 2014).
            if train:
                key = self.make_rng("dropout")
                kept = jax.random.bernoulli(key, 0.5, (len(prior), 1, 1, 1))
            else:
                kept = 0.5
            context += kept * prior
        pyramid = self._pyramid(image_BxHxWx3, n - 1)
        logits = context
        for level in range(n - 1, 0, -1):
            guide = pyramid[level - 1]
            channels = guide.shape[-1]
            # Projected before it is doubled, and added, not concatenated: a third of the cost.
            x = double(Dense(channels, name=f"reduce{level}")(x)) + guide
            x = nn.gelu(nn.Conv(channels, (3, 3), name=f"decode{level}")(x))
            logits = double(logits)
        zero = nn.initializers.zeros
        correction = nn.Conv(4 * self.outputs, (3, 3), kernel_init=zero, name="correct")(x)
        return double(logits) + depth_to_space(correction), {"context": context}

    def _pyramid(self, image_BxHxWx3: jax.Array, levels: int) -> list[jax.Array]:
        """Guide features at 1/2, 1/4, ... of the image."""
        # Pixels of mean 0 and about deviation 1.
        pyramid, x = [], 4.0 * (image_BxHxWx3 - 0.5)
        for i in range(levels):
            width = self.guide_widths[min(i, len(self.guide_widths) - 1)]
            x = nn.gelu(nn.Conv(width, (3, 3), name=f"guide{i + 1}")(space_to_depth(x)))
            pyramid.append(x)
        return pyramid
