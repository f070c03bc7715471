"""Vision transformers of DINO (Caron et al., ICCV 2021) and DINOv2 (Oquab et al., TMLR 2024)."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxseg.nn.dense import Dense
from jaxseg.ops.resize import interpolate_position_embedding
from jaxseg.options import option


@dataclasses.dataclass(frozen=True)
class Variant:
    """The shape of one ViT: all that is needed to build it and to read its weights.

    `grid` is the side of the native position grid, `registers` the number of register tokens
    (Darcet et al., ICLR 2024); `pos_offset` and `pos_antialias` say how positions are resized.
    """

    name: str
    patch: int
    dim: int
    depth: int
    heads: int
    grid: int
    mlp_ratio: int = 4
    layerscale: bool = False
    registers: int = 0
    pos_offset: float = 0.1
    pos_antialias: bool = False

    @property
    def layer_names(self) -> tuple[tuple[str, ...], ...]:
        """The parameters' names by layer, from the input on; the final norm belongs to none."""
        embedding = ("cls_token", "pos_embed", "register_tokens", "patch_embed")
        return (embedding, *((f"blocks_{i}",) for i in range(self.depth)))


def _dinov2(name: str, dim: int, depth: int, heads: int) -> list[Variant]:
    plain = Variant(name, 14, dim, depth, heads, grid=37, layerscale=True)
    with_registers = dataclasses.replace(
        plain, name=f"{name}_reg", registers=4, pos_offset=0.0, pos_antialias=True
    )
    return [plain, with_registers]


# Sizes: DINO, github.com/facebookresearch/dino/blob/main/vision_transformer.py; DINOv2 and its
# registers, github.com/facebookresearch/dinov2/blob/main/dinov2/hub/backbones.py.
VARIANTS: dict[str, Variant] = {
    variant.name: variant
    for variant in [
        Variant("dino_vitt16", 16, 192, 12, 3, grid=14),
        Variant("dino_vits16", 16, 384, 12, 6, grid=14),
        Variant("dino_vits8", 8, 384, 12, 6, grid=28),
        Variant("dino_vitb16", 16, 768, 12, 12, grid=14),
        Variant("dino_vitb8", 8, 768, 12, 12, grid=28),
        *_dinov2("dinov2_vits14", 384, 12, 6),
        *_dinov2("dinov2_vitb14", 768, 12, 12),
        *_dinov2("dinov2_vitl14", 1024, 24, 16),
        # Ours: small enough to train together with a head on a laptop.
        Variant("vit_micro16", 16, 128, 4, 4, grid=8),
        Variant("vit_micro8", 8, 128, 4, 4, grid=16),
        # Ours, for small images, as those of CIFAR.
        Variant("vit_small4", 4, 384, 12, 6, grid=8),
    ]
}

_weight_init = nn.initializers.truncated_normal(0.02)
# PyTorch's default for convolutions, which the reference leaves in place for the patch embedding.
_patch_init = nn.initializers.variance_scaling(
    1 / 3, "fan_in", "uniform", in_axis=(0, 1, 2), out_axis=3
)


def gelu(x: jax.Array) -> jax.Array:
    """Exact GELU, x Phi(x). The erf form is faster on CPUs than the erfc form of `jax.nn.gelu`."""
    return x * 0.5 * (1 + jax.lax.erf(x * 0.5**0.5))


class LayerScale(nn.Module):
    """A learned factor per channel (Touvron et al., ICCV 2021)."""

    dtype: Any

    @nn.compact
    def __call__(self, x_BxNxD: jax.Array) -> jax.Array:
        gamma = self.param("gamma", nn.initializers.constant(1e-5), (x_BxNxD.shape[-1],))
        return x_BxNxD * gamma.astype(self.dtype)


# A CPU core's share of cache: attention logits are made and used up in pieces of this many bytes.
_PIECE_BYTES = 2**21
_PIECEWISE_FROM = 400  # Tokens: shorter sequences are faster whole.


def _attend(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """Softmax attention of [B, heads, N, d], scaled queries; logits and sums in float32."""
    logits = jnp.einsum("bhqd,bhkd->bhqk", q, k, preferred_element_type=jnp.float32)
    # Dividing the product by the sum, not the [N, N] weights, saves a pass over the largest array.
    weights = jnp.exp(logits - jax.lax.stop_gradient(logits.max(axis=-1, keepdims=True)))
    out = jnp.einsum(
        "bhqk,bhkd->bhqd", weights.astype(v.dtype), v, preferred_element_type=jnp.float32
    )
    return (out / weights.sum(axis=-1, keepdims=True)).astype(v.dtype)


def _attend_in_pieces(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """`_attend`, one head and some queries at a time; the batch stays whole, so it may be sharded."""
    b, heads, n, d = q.shape
    batch = b if isinstance(b, int) else 1  # `jax.export` may leave the batch symbolic.
    pieces = -(-n // max(16, _PIECE_BYTES // (4 * batch * n)))
    size = -(-n // pieces)
    q = jnp.pad(q, ((0, 0), (0, 0), (0, pieces * size - n), (0, 0)))
    q = q.reshape(b, heads, pieces, 1, size, d).transpose(1, 2, 0, 3, 4, 5)
    k, v = (jnp.moveaxis(x, 1, 0)[:, :, None] for x in (k, v))

    def head(args: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
        pieces_q, head_k, head_v = args
        return jax.lax.map(lambda piece_q: _attend(piece_q, head_k, head_v), pieces_q)

    out = jax.lax.map(head, (q, k, v))
    return out.transpose(2, 0, 3, 1, 4, 5).reshape(b, heads, pieces * size, d)[:, :, :n]


# Tokens from which cuDNN's attention is the faster one.
_FUSED_FROM = 128


def _fused(dtype: Any, tokens: int) -> bool:
    """Whether cuDNN's attention, which keeps no [N, N] array, takes over.

    It is for half precision on CUDA, from the Ampere generation (8.0) on.
    """
    if jnp.dtype(dtype).itemsize != 2 or tokens < _FUSED_FROM:
        return False
    device = jax.devices()[0]
    if "cuda" not in device.client.platform_version:
        return False
    return float(device.compute_capability) >= 8


def _attend_fused(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """`_attend` by cuDNN, which takes even lengths only: a token more, that nothing attends to."""
    b, _, n, _ = q.shape
    padded = ((0, 0), (0, n % 2), (0, 0), (0, 0))
    lengths = jnp.full(b, n, jnp.int32) if n % 2 else None
    out = jax.nn.dot_product_attention(
        *(jnp.pad(jnp.swapaxes(x, 1, 2), padded) for x in (q, k, v)),
        scale=1.0,
        query_seq_lengths=lengths,
        key_value_seq_lengths=lengths,
        implementation="cudnn",
    )
    return jnp.swapaxes(out[:, :n], 1, 2)


class Attention(nn.Module):
    """Multi-head self-attention."""

    heads: int
    dtype: Any

    @nn.compact
    def __call__(
        self, x_BxNxD: jax.Array, *, with_weights: bool = False
    ) -> tuple[jax.Array, jax.Array | None]:
        """Returns the output [B, N, D] and, if asked, the weights [B, heads, N, N], float32."""
        b, n, dim = x_BxNxD.shape
        qkv = Dense(3 * dim, dtype=self.dtype, kernel_init=_weight_init, name="qkv")(x_BxNxD)
        qkv = qkv.reshape(b, n, 3, self.heads, dim // self.heads)
        q, k, v = jnp.moveaxis(qkv, (2, 3), (0, 2))
        q = q * (dim // self.heads) ** -0.5
        if _fused(self.dtype, n):
            out = _attend_fused(q, k, v)
        elif n < _PIECEWISE_FROM:
            out = _attend(q, k, v)
        else:
            out = jax.lax.platform_dependent(q, k, v, cpu=_attend_in_pieces, default=_attend)
        out = jnp.swapaxes(out, 1, 2).reshape(b, n, dim)
        out = Dense(dim, dtype=self.dtype, kernel_init=_weight_init, name="proj")(out)
        if not with_weights:
            return out, None
        logits = jnp.einsum("bhqd,bhkd->bhqk", q, k, preferred_element_type=jnp.float32)
        return out, jax.nn.softmax(logits, axis=-1)


class Mlp(nn.Module):
    """Two linear layers with an exact GELU between them."""

    ratio: int
    dtype: Any

    @nn.compact
    def __call__(self, x_BxNxD: jax.Array) -> jax.Array:
        dim = x_BxNxD.shape[-1]
        x = Dense(self.ratio * dim, dtype=self.dtype, kernel_init=_weight_init, name="fc1")(x_BxNxD)
        return Dense(dim, dtype=self.dtype, kernel_init=_weight_init, name="fc2")(gelu(x))


def drop_path(x_BxNxD: jax.Array, keys_B: jax.Array | None, rate: float) -> jax.Array:
    """Stochastic depth (Huang et al., ECCV 2016): an example's branch is 0 with probability `rate`.

    What is kept is scaled by 1 / (1 - rate). A key for each example makes the draw independent of the
    batch that it is in; without keys nothing is dropped.
    """
    if keys_B is None or not rate:
        return x_BxNxD
    kept = jax.vmap(lambda key: jax.random.bernoulli(key, 1.0 - rate))(keys_B)
    return x_BxNxD * (kept / (1.0 - rate)).astype(x_BxNxD.dtype)[:, None, None]


class Block(nn.Module):
    """A pre-norm transformer block.

    Attributes:
      drop_rate: of `drop_path` for both branches.
      with_weights: whether to return the attention weights.
    """

    variant: Variant
    dtype: Any
    drop_rate: float = 0.0
    with_weights: bool = False

    @nn.compact
    def __call__(
        self, x_BxNxD: jax.Array, keys_2xB: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array | None]:
        """Returns the tokens [B, N, D] and, if asked, the attention weights [B, heads, N, N]."""
        v = self.variant
        keys = (None, None) if keys_2xB is None else keys_2xB
        y, weights = Attention(v.heads, self.dtype, name="attn")(
            nn.LayerNorm(epsilon=1e-6, dtype=self.dtype, name="norm1")(x_BxNxD),
            with_weights=self.with_weights,
        )
        y = LayerScale(self.dtype, name="ls1")(y) if v.layerscale else y
        x = x_BxNxD + drop_path(y, keys[0], self.drop_rate)
        y = Mlp(v.mlp_ratio, self.dtype, name="mlp")(
            nn.LayerNorm(epsilon=1e-6, dtype=self.dtype, name="norm2")(x)
        )
        y = LayerScale(self.dtype, name="ls2")(y) if v.layerscale else y
        return x + drop_path(y, keys[1], self.drop_rate), weights


class PatchEmbed(nn.Module):
    """Linear embedding of non-overlapping patches, as one matrix product."""

    variant: Variant
    dtype: Any

    @nn.compact
    def __call__(self, image_BxHxWx3: jax.Array) -> jax.Array:
        b, height, width, channels = image_BxHxWx3.shape
        p, dim = self.variant.patch, self.variant.dim
        kernel = self.param("kernel", _patch_init, (p, p, channels, dim))
        bias = self.param("bias", nn.initializers.zeros, (dim,))
        x = image_BxHxWx3.astype(self.dtype).reshape(b, height // p, p, width // p, p, channels)
        x = jnp.swapaxes(x, 2, 3).reshape(b, (height // p) * (width // p), p * p * channels)
        return x @ kernel.reshape(-1, dim).astype(self.dtype) + bias.astype(self.dtype)


class ViT(nn.Module):
    """A vision transformer for images of any size that is a multiple of the patch size.

    Parameters are float32; tokens and matrix products are of `dtype` (float32 or bfloat16), and so is
    the sum of the residual branches, which the reference keeps in float32 under autocast; LayerNorm
    statistics and softmax are float32. On GPUs and TPUs float32 products follow
    `jax.default_matmul_precision`.

    Attributes:
      drop_path: stochastic depth of the last block, rising linearly from 0 in the first; only where
        keys are given.
      remat: compute a block's activations again in the backward pass instead of keeping them.
    """

    variant: Variant
    dtype: Any = jnp.float32
    drop_path: float = option(0.0, "stochastic depth of a ViT's last block", low=0, high=0.9)
    remat: bool = option(False, "compute activations again: less memory, more time", neutral=False)

    @property
    def patch(self) -> int:
        return self.variant.patch

    @property
    def depth(self) -> int:
        return self.variant.depth

    @property
    def layer_names(self) -> tuple[tuple[str, ...], ...]:
        return self.variant.layer_names

    @nn.compact
    def __call__(
        self,
        image_BxHxWx3: jax.Array,
        *,
        layers: Sequence[int] = (),
        attention: bool = False,
        drop_keys_B: jax.Array | None = None,
    ) -> dict[str, Any]:
        """Computes the features of normalised images.

        Args:
          image_BxHxWx3: float, normalised (the released weights expect ImageNet mean and deviation).
          layers: blocks to return besides the last; negative ones count from the end.
          attention: whether to return the attention of the last block.
          drop_keys_B: a random key for each image, for `drop_path`.

        Returns:
          Float32 arrays. `cls` [B, D] and `patches` [B, h, w, D] after the final norm. `layers` and
          `layers_cls`: the same two of each block in `layers`, by the index asked for, each after
          the final norm. `attention` (if asked): [B, heads, N, N], query by key, tokens in the order
          CLS, registers, patches by rows.

        Raises:
          ValueError: the image is not [B, H, W, 3] with H and W positive multiples of the patch,
            or there is no such block.
        """
        v = self.variant
        grid_hw = _check_input(image_BxHxWx3.shape, v.patch)
        wanted = {index: _block_index(index, v.depth) for index in layers}
        x = self._tokens(image_BxHxWx3, grid_hw)
        norm = nn.LayerNorm(epsilon=1e-6, dtype=jnp.float32, name="norm")
        kept = {}
        block = nn.remat(Block) if self.remat else Block
        for i in range(v.depth):
            keys = None
            if drop_keys_B is not None and self.drop_path:
                branches = jnp.arange(2 * i, 2 * i + 2)
                keys = jax.vmap(lambda n: jax.vmap(jax.random.fold_in, (0, None))(drop_keys_B, n))(
                    branches
                )
            rate = self.drop_path * i / max(v.depth - 1, 1)
            with_weights = attention and i == v.depth - 1
            x, weights = block(v, self.dtype, rate, with_weights, name=f"blocks_{i}")(x, keys)
            if i in wanted.values():
                kept[i] = norm(x)
        x = norm(x)

        def split(tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
            patches = tokens[:, 1 + v.registers :]
            return tokens[:, 0], patches.reshape(*tokens.shape[:1], *grid_hw, v.dim)

        cls, patches = split(x)
        out = {"cls": cls, "patches": patches}
        out["layers"] = {index: split(kept[i])[1] for index, i in wanted.items()}
        out["layers_cls"] = {index: split(kept[i])[0] for index, i in wanted.items()}
        if attention:
            out["attention"] = weights
        return out

    def _tokens(self, image_BxHxWx3: jax.Array, grid_hw: tuple[int, int]) -> jax.Array:
        v = self.variant
        b = image_BxHxWx3.shape[0]
        x = PatchEmbed(v, self.dtype, name="patch_embed")(image_BxHxWx3)
        cls = self.param("cls_token", _weight_init, (1, 1, v.dim))
        pos = self.param("pos_embed", _weight_init, (1, 1 + v.grid**2, v.dim))
        pos = interpolate_position_embedding(
            pos, grid_hw, offset=v.pos_offset, antialias=v.pos_antialias
        )
        first = jnp.broadcast_to(cls + pos[:, :1], (b, 1, v.dim)).astype(self.dtype)
        parts = [first, x + pos[:, 1:].astype(self.dtype)]
        if v.registers:
            registers = self.param("register_tokens", _weight_init, (1, v.registers, v.dim))
            registers = jnp.broadcast_to(registers, (b, v.registers, v.dim)).astype(self.dtype)
            parts.insert(1, registers)
        return jnp.concatenate(parts, axis=1)


def _check_input(shape: tuple[int, ...], patch: int) -> tuple[int, int]:
    """Returns the patch grid (h, w) of an image batch of this shape."""
    if len(shape) != 4 or shape[-1] != 3:
        raise ValueError(f"expected images of shape [B, H, W, 3], got {tuple(shape)}")
    height, width = shape[1:3]
    if height % patch or width % patch or not height or not width:
        raise ValueError(
            f"images of {height}x{width} cannot be cut into patches of {patch}: "
            f"height and width must be positive multiples of {patch}"
        )
    return height // patch, width // patch


def _block_index(index: int, depth: int) -> int:
    if not -depth <= index < depth:
        raise ValueError(f"no block {index}: allowed are {-depth} to {depth - 1}")
    return index % depth
