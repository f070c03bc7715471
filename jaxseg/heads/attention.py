"""A head for the class that is asked for: its query attends to the features, then a light decoder.

As in the Freiburg course, a one-hot class becomes a query, keys and values come from the deepest
features, and every position's value times its attention weight goes to the decoder: unlike the sum
that attention returns, these *attended features* keep their place. Two things slow the course's form
down, and are different in ours. Its weights sum to 1 over N positions, so that features of size 1
reach the decoder as 1/N, among low-level ones of size 1. And they only say where the class would be
rather than elsewhere: that it is nowhere must be told from values which do not know what was asked.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxseg.heads.guided import space_to_depth
from jaxseg.nn.dense import Dense
from jaxseg.ops.attention import additive, scaled_dot_product
from jaxseg.ops.resize import resize_bilinear
from jaxseg.options import option

ATTENTIONS = ("dot", "additive")
CONTEXTS = ("scaled", "course")
NORMS = ("group", "batch")
LOW_STRIDE = 4

Features = jax.Array | Mapping[int, jax.Array]


class ClassAttention(nn.Module):
    """Segments the one class of C that is asked for, in every image its own.

    `__call__` is `encode`, which does not see the query and is worth doing once for many, then
    `decode`.

    Attributes:
      outputs: logits per pixel, K: not the class, the class.
      classes: C.
      width: channels of queries, keys and values.
      attention: "dot" (scaled dot product) or "additive".
      context: what the decoder sees at position n, of its value v, its weight a among N positions
        and the query q: "course" is `a v`; "scaled" is `g v * (W q)`, whose product with the query
        tells the decoder what was asked, with `g = 1/2 + N a / (1 + N a)`, which is 1 where the
        attention is even, whatever N is, and between 1/2 and 3/2 where it is not.
      channels: of the decoder, a multiple of 8.
      low_channels: of the low-level features, a multiple of 8.
      dropout: of whole channels of the deepest features, in training.
      norm: of the decoder: "group" (groups of 8 channels), or "batch", as in the course. A batch's
        statistics depend on how many of the classes asked for are present: half of them or more in
        training, few when all are asked in turn. With groups each image and query stands alone.
    """

    several_maps: ClassVar[bool] = True
    asks: ClassVar[bool] = True

    outputs: int = 2
    classes: int = 5
    width: int = option(512, "channels of queries, keys and values", low=1, high=2**16)
    attention: str = option("dot", "how the query is compared with the keys", choices=ATTENTIONS)
    context: str = option("scaled", "what the decoder sees", choices=CONTEXTS)
    channels: int = option(64, "of the decoder", low=8, high=2**16, multiple=8)
    low_channels: int = option(48, "of the low-level features", low=8, high=2**16, multiple=8)
    dropout: float = option(0.1, "of channels of the deepest features", low=0, high=0.99)
    norm: str = option("group", "of the decoder", choices=NORMS)

    def setup(self) -> None:
        _check_option("attention", self.attention, ATTENTIONS)
        _check_option("context", self.context, CONTEXTS)
        _check_option("norm", self.norm, NORMS)
        linear = partial(Dense, self.width, use_bias=False)
        conv = partial(nn.Conv, self.channels, (3, 3), use_bias=False)
        self.class_query = Dense(self.width)
        self.to_query, self.to_key, self.to_value = linear(), linear(), linear()
        if self.attention == "additive":
            self.score = self.param(
                "score", nn.initializers.normal(self.width**-0.5), (self.width,)
            )
        if self.context == "scaled":
            self.standardise = nn.LayerNorm(use_bias=False, use_scale=False)
            self.drop = nn.Dropout(self.dropout, broadcast_dims=(1, 2))
            self.to_gain = linear()
            self.reduce, self.reduce_norm = Dense(self.channels), _Norm(self.norm)
        # A convolution of what is joined is the sum of one of each; the low-level one needs no query.
        self.join_low, self.join_context = conv(), conv()
        self.join_norm, self.decode_conv, self.decode_norm = (
            _Norm(self.norm),
            conv(),
            _Norm(self.norm),
        )
        self.classify = Dense(self.outputs)
        self.stem = [nn.Conv(c, (3, 3)) for c in (16, self.low_channels)]
        self.low, self.low_norm = Dense(self.low_channels, use_bias=False), _Norm(self.norm)

    def __call__(
        self,
        features: Features,
        image_BxHxWx3: jax.Array,
        *,
        query_B: jax.Array,
        train: bool = False,
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Logits of one class for each image.

        Args:
          features: `B x h x w x C` or, by stride, several of them; the deepest is attended to, that
            of stride 4 is the decoder's low-level one. Without it the image is, and its height and
            width must be multiples of 4.
          image_BxHxWx3: float in [0, 1].
          query_B: integers in [0, classes), the class asked for. Not checked: others ask for none.
            `B x Q` asks Q times; what is returned then has Q after B.
          train: whether dropout is on (needs the rng `dropout`), and batch norm learns.

        Returns:
          (logits float32 `B x H x W x K`, {"attention": weights float32 `B x h x w`, sum 1}).

        Raises:
          ValueError: an option or a shape is not one of the above.
        """
        encoded = self.encode(features, image_BxHxWx3, train=train)
        decode = partial(self.decode, encoded, size=image_BxHxWx3.shape[1:3], train=train)
        if query_B.ndim == 1:
            return decode(query_B)
        answers = [decode(query) for query in query_B.T]
        return jax.tree.map(lambda *parts: jnp.stack(parts, 1), *answers)

    def encode(
        self, features: Features, image_BxHxWx3: jax.Array, *, train: bool = False
    ) -> dict[str, jax.Array]:
        """All that does not depend on the query: for `decode`."""
        by_stride = features if isinstance(features, Mapping) else {0: features}
        x = by_stride[max(k for k in by_stride if isinstance(k, int))].astype(jnp.float32)
        if self.context == "scaled":
            x = self.drop(self.standardise(x), deterministic=not train)
        if LOW_STRIDE in by_stride:
            low = self.low(by_stride[LOW_STRIDE].astype(jnp.float32))
        else:
            low = self._stem(image_BxHxWx3)
        low = nn.relu(self.low_norm(low, train))
        return {"key": self.to_key(x), "value": self.to_value(x), "low": self.join_low(low)}

    def decode(
        self,
        encoded: Mapping[str, jax.Array],
        query_B: jax.Array,
        *,
        size: tuple[int, int],
        train: bool = False,
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """What `__call__` returns, of what `encode` gives for images of `size` = (H, W).

        For several queries map it with `jax.lax.map`: on CPUs `jax.vmap` takes twice as long.
        """
        value = encoded["value"]
        if query_B.shape != value.shape[:1] or not jnp.issubdtype(query_B.dtype, jnp.integer):
            raise ValueError(
                f"expected {value.shape[0]} integers to ask for classes, got {query_B.dtype} of "
                f"shape {tuple(query_B.shape)}"
            )
        query_BxD = self.class_query(jax.nn.one_hot(query_B, self.classes))
        weights = self._weights(query_BxD, encoded["key"])
        if self.context == "course":
            x = weights[..., None] * value
        else:
            relative = weights * (weights.shape[1] * weights.shape[2])
            gate = (0.5 + relative / (1.0 + relative))[..., None]
            x = gate * value * self.to_gain(query_BxD)[:, None, None]
            x = nn.relu(self.reduce_norm(self.reduce(x), train))
        low = encoded["low"]
        x = self.join_context(resize_bilinear(x, low.shape[1:3])) + low
        x = nn.relu(self.join_norm(x, train))
        x = nn.relu(self.decode_norm(self.decode_conv(x), train))
        return resize_bilinear(self.classify(x), size), {"attention": weights}

    def _weights(self, query_BxD: jax.Array, key_BxhxwxD: jax.Array) -> jax.Array:
        b, h, w, width = key_BxhxwxD.shape
        key = key_BxhxwxD.reshape(b, h * w, width)
        query = self.to_query(query_BxD)[:, None]
        # The weighted sum, attention's usual result, is not wanted: no values.
        attend = (
            partial(additive, v_A=self.score)
            if self.attention == "additive"
            else scaled_dot_product
        )
        return attend(query, key, key[..., :0])[1].reshape(b, h, w)

    def _stem(self, image_BxHxWx3: jax.Array) -> jax.Array:
        height, width = image_BxHxWx3.shape[1:3]
        if height % LOW_STRIDE or width % LOW_STRIDE:
            raise ValueError(
                f"images of {height}x{width} without features of stride {LOW_STRIDE}: height and "
                f"width must be multiples of {LOW_STRIDE}"
            )
        first, second = self.stem
        x = nn.gelu(first(space_to_depth(4.0 * (image_BxHxWx3 - 0.5))))
        return second(space_to_depth(x))


class _Norm(nn.Module):
    """Group norm in groups of 8 channels, or batch norm: over the whole batch, on all devices."""

    kind: str

    @nn.compact
    def __call__(self, x_BxHxWxC: jax.Array, train: bool) -> jax.Array:
        if self.kind == "group":
            return nn.GroupNorm(num_groups=None, group_size=8, epsilon=1e-5)(x_BxHxWxC)
        norm = nn.BatchNorm(use_running_average=not train, momentum=0.9, epsilon=1e-5)
        return norm(x_BxHxWxC)


def _check_option(name: str, value: Any, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} is {value!r}: allowed are {', '.join(allowed)}")
