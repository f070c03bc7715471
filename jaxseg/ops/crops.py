"""The random crops of DINO (Caron et al., 2021) on the device: torchvision's and Pillow's operations.

Resizing and blurring are matrix products with matrices made from the drawn box and sigma, and what
happens to some examples only is masked, so one program serves the whole batch. The public
operations take one image [H, W, 3]. Inside it is [H, 3, W], which both products take and give as it
is and in which neighbours are neighbours in memory.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jaxseg.ops import geometry

_ATTEMPTS = 10
_BOX = 2 * _ATTEMPTS + 2  # how many random numbers a box takes
_LOOK = 12  # and flip, colour and blur


@dataclasses.dataclass(frozen=True)
class View:
    """How one kind of crop is drawn; the defaults are those that all of DINO's crops share.

    Attributes:
      size: side of the crop in pixels.
      scale: (low, high) of the share of the image's area that is cropped.
      ratio: (low, high) of the cropped box's width / height, drawn log-uniformly.
      flip, jitter, gray, blur, solarize: probabilities of a left-right flip, colour jitter, loss of
        colour, blur and solarisation; they are applied in this order.
      brightness, contrast, saturation: largest relative change, each drawn from U(1 - x, 1 + x).
      hue: largest shift of the hue, at most 0.5 (half a turn), drawn from U(-hue, hue).
      blur_sigma: (low, high) of the blur's standard deviation in pixels, drawn uniformly.

    Raises ValueError for values out of range.
    """

    size: int
    scale: tuple[float, float]
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: float = 0.5
    jitter: float = 0.8
    brightness: float = 0.4
    contrast: float = 0.4
    saturation: float = 0.2
    hue: float = 0.1
    gray: float = 0.2
    blur: float = 0.0
    blur_sigma: tuple[float, float] = (0.1, 2.0)
    solarize: float = 0.0

    def __post_init__(self):
        def need(name: str, good: bool, allowed: str) -> None:
            if not good:
                raise ValueError(
                    f"{name} of a view is {getattr(self, name)!r}: allowed is {allowed}"
                )

        need("size", isinstance(self.size, int) and self.size >= 1, "a whole number from 1")
        for name, most in (("scale", 1.0), ("ratio", math.inf), ("blur_sigma", math.inf)):
            low, high = getattr(self, name)
            need(name, 0 < low <= high <= most and high < math.inf, f"0 < low <= high <= {most}")
        for name in ("flip", "jitter", "gray", "blur", "solarize"):
            need(name, 0 <= getattr(self, name) <= 1, "0 to 1")
        for name in ("brightness", "contrast", "saturation"):
            need(name, 0 <= getattr(self, name) < math.inf, "at least 0")
        need("hue", 0 <= self.hue <= 0.5, "0 to 0.5")


def example_keys(rng: jax.Array, row_B: jax.Array) -> jax.Array:
    """Two keys for each example, [B, 2], that follow from its place in the global batch."""
    return jax.vmap(lambda row: jax.random.split(jax.random.fold_in(rng, row)))(row_B)


def crop_box(
    key: jax.Array, extent: jax.Array, scale: tuple[float, float], ratio: tuple[float, float]
) -> jax.Array:
    """Draws torchvision's RandomResizedCrop box in an image of `extent` = (h, w) pixels.

    Returns int32 (top, left, height, width). The first of ten draws that fits is taken; if none
    does, the largest central box whose width / height is within `ratio`.
    """
    return _crop_box(jax.random.uniform(key, (_BOX,)), extent, scale, ratio)


def _crop_box(
    numbers: jax.Array, extent: jax.Array, scale: tuple[float, float], ratio: tuple[float, float]
) -> jax.Array:
    height, width = jnp.asarray(extent, jnp.int32)
    share, turn, (top, left) = jnp.split(numbers, [_ATTEMPTS, 2 * _ATTEMPTS])
    area = _between(scale, share) * (height * width)
    aspect = jnp.exp(_between((math.log(ratio[0]), math.log(ratio[1])), turn))
    heights = jnp.round(jnp.sqrt(area / aspect)).astype(jnp.int32)
    widths = jnp.round(jnp.sqrt(area * aspect)).astype(jnp.int32)
    fits = (heights > 0) & (heights <= height) & (widths > 0) & (widths <= width)
    first, found = jnp.argmax(fits), fits.any()
    # At most one of the two minima cuts, the one along the side that is too long for `ratio`.
    tallest = jnp.minimum(height, jnp.round(width / ratio[0]).astype(jnp.int32))
    widest = jnp.minimum(width, jnp.round(height * ratio[1]).astype(jnp.int32))
    h = jnp.where(found, heights[first], tallest)
    w = jnp.where(found, widths[first], widest)
    top = jnp.where(found, _whole(top, height - h + 1), (height - h) // 2)
    left = jnp.where(found, _whole(left, width - w + 1), (width - w) // 2)
    return jnp.stack([top, left, h, w])


def resized_crop(image: jax.Array, box: jax.Array, size: int) -> jax.Array:
    """Returns what Pillow's crop(box).resize((size, size), BICUBIC) does, but for 8-bit rounding.

    Float [H, W, 3] in [0, 1] and `box` = (top, left, height, width) in whole pixels inside it, to
    [size, size, 3] in [0, 1]. Nothing outside the box is seen.
    """
    return _outer(_resized_crop(_inner(image), box, size, flip=False))


def center_crops(
    images: jax.Array, extents: jax.Array, size: tuple[int, int], *, share: float = 1.0
) -> jax.Array:
    """The middle of images as the field evaluates: resized, its centre cut out, in one resampling.

    Args:
      images: [B, H, W, 3], uint8 or float in [0, 1].
      extents: int [B, 2], (h, w) of the part that is image; it is at the top left.
      size: (height, width) of the result. The cut has its shape, and is as large as fits.
      share: of that largest cut's sides; 0.875 is "resize to 256, crop 224".

    Returns:
      float32 [B, height, width, 3] in [0, 1]; bicubic with antialiasing, as Pillow's.
    """

    def example(image, extent):
        h, w = jnp.maximum(extent, 1)
        scale = share * jnp.minimum(h / size[0], w / size[1])
        sides = [jnp.maximum(jnp.round(scale * n).astype(jnp.int32), 1) for n in size]
        top, left = (h - sides[0]) // 2, (w - sides[1]) // 2
        x = _inner(_to_float(image))
        rows = _bicubic_matrix(top, sides[0], x.shape[0], size[0])
        columns = _bicubic_matrix(left, sides[1], x.shape[2], size[1], False)
        return _outer(_clip(_along_height(_clip(_along_width(x, columns)), rows)))

    return jax.vmap(example)(images, extents)


def _resized_crop(x: jax.Array, box: jax.Array, size: int, *, flip: jax.Array | bool) -> jax.Array:
    rows = _bicubic_matrix(box[0], box[2], x.shape[0], size)
    columns = _bicubic_matrix(box[1], box[3], x.shape[2], size, flip)
    # As Pillow before 13, which since goes down the columns first where the height shrinks more. That
    # shows where the first product leaves [0, 1], since it is clipped in between.
    return _clip(_along_height(_clip(_along_width(x, columns)), rows))


def _along_width(x: jax.Array, matrix_WxO: jax.Array) -> jax.Array:
    return jnp.einsum("hcw,wo->hco", x, matrix_WxO, precision=jax.lax.Precision.HIGHEST)


def _along_height(x: jax.Array, matrix_HxO: jax.Array) -> jax.Array:
    return jnp.einsum("ho,hcw->ocw", matrix_HxO, x, precision=jax.lax.Precision.HIGHEST)


def _bicubic_matrix(
    start: jax.Array, length: jax.Array, n_in: int, n_out: int, flip: jax.Array | bool = False
) -> jax.Array:
    """The [n_in, n_out] matrix that resizes pixels start to start + length (exclusive) to n_out.

    Keys' kernel with a = -0.5, widened when shrinking, cut at the box and renormalised.
    """
    step = length / n_out
    pixel = jnp.arange(n_in)[:, None] - start
    out = jnp.arange(n_out)
    centre = (jnp.where(flip, n_out - 1 - out, out) + 0.5) * step
    x = jnp.abs(pixel + 0.5 - centre) / jnp.maximum(step, 1.0)
    near = (1.5 * x - 2.5) * x * x + 1
    far = ((2.5 - 0.5 * x) * x - 4) * x + 2
    weight = jnp.where(x < 1, near, jnp.where(x < 2, far, 0.0))
    weight = jnp.where((pixel >= 0) & (pixel < length), weight, 0.0)
    return weight / weight.sum(axis=0)


def adjust_brightness(image: jax.Array, factor: jax.Array | float) -> jax.Array:
    """Multiplies [H, W, 3] in [0, 1] by `factor` >= 0 and clips, as Pillow's ImageEnhance does."""
    return _outer(_blend(_inner(image), factor, 0.0, 0.0))


def adjust_contrast(image: jax.Array, factor: jax.Array | float) -> jax.Array:
    """Blends [H, W, 3] in [0, 1] with the mean of its grey image: 0 is uniform, 1 changes nothing."""
    return _outer(_blend(_inner(image), factor, 1.0, 0.0))


def adjust_saturation(image: jax.Array, factor: jax.Array | float) -> jax.Array:
    """Blends [H, W, 3] in [0, 1] with its grey image: 0 is grey, 1 changes nothing."""
    return _outer(_blend(_inner(image), factor, 0.0, 1.0))


def _blend(x: jax.Array, factor: jax.Array, mean: jax.Array, pixel: jax.Array) -> jax.Array:
    """factor * x + (1 - factor) * target, clipped; the target is `mean` and `pixel` times grey."""
    grey = _luma(x)
    return _clip(factor * x + (1 - factor) * (pixel * grey + mean * grey.mean()))


def adjust_hue(image: jax.Array, shift: jax.Array | float) -> jax.Array:
    """Adds `shift` in [-0.5, 0.5] (turns) to the hue in HSV of [H, W, 3] in [0, 1]."""
    return _outer(_adjust_hue(_inner(image), shift))


def _adjust_hue(x: jax.Array, shift: jax.Array | float) -> jax.Array:
    """HSV's hexagon without a division: all hues are multiplied by the chroma, in sixths of a turn.

    A channel is value - clip(2 chroma - d, 0, chroma) with d the hue's distance around the circle
    from the opposite colour.
    """
    red, green, blue = x[:, 0], x[:, 1], x[:, 2]
    value = x.max(1)
    chroma = value - x.min(1)
    # Not `== value`: if XLA computes x again for this line, its last bit may differ.
    hue = jnp.where(
        (red >= green) & (red >= blue),
        green - blue,
        jnp.where(green >= blue, 2 * chroma + blue - red, 4 * chroma + red - green),
    )
    channels = []
    for opposite in (3, 5, 1):  # cyan, magenta, yellow
        gap = jnp.abs(hue + (6 * shift - opposite) * chroma)
        # The gap is at most 9 chroma, the circle 6 chroma long.
        around = jnp.minimum(gap, jnp.abs(gap - 6 * chroma))
        channels.append(value - jnp.clip(2 * chroma - around, 0.0, chroma))
    return _clip(jnp.stack(channels, axis=1))


def to_gray(image: jax.Array) -> jax.Array:
    """Returns the luma (ITU-R 601) of [H, W, 3] in [0, 1], three times."""
    return adjust_saturation(image, 0.0)


def gaussian_blur(image: jax.Array, sigma: jax.Array | float, *, radius: int = 8) -> jax.Array:
    """Blurs [H, W, 3] with a Gaussian of `sigma` >= 0 pixels, cut at `radius` and renormalised.

    Beyond the border the border's pixels repeat. The default radius suits a sigma up to 2.
    """
    return _outer(_gaussian_blur(_inner(image), sigma, radius))


def _gaussian_blur(x: jax.Array, sigma: jax.Array | float, radius: int) -> jax.Array:
    rows, columns = (_gaussian_matrix(x.shape[axis], sigma, radius) for axis in (0, 2))
    return _along_height(_along_width(x, columns), rows)


def _gaussian_matrix(n: int, sigma: jax.Array | float, radius: int) -> jax.Array:
    """The [n, n] matrix of the blur along one axis; its outer rows have what falls off the border.

    A sum of shifted images is cheaper alone, but XLA on CPUs then repeats what precedes per shift.
    """
    offset = jnp.arange(-radius, n + radius)[:, None] - jnp.arange(n)
    weight = jnp.exp(-0.5 * (offset / jnp.maximum(sigma, 1e-3)) ** 2)  # sigma 0 changes nothing
    weight = jnp.where(jnp.abs(offset) <= radius, weight, 0.0)
    weight = weight / weight.sum(axis=0)
    before, inside, beyond = jnp.split(weight, [radius, radius + n])
    first, last = (jnp.arange(n)[:, None] == i for i in (0, n - 1))
    return inside + first * before.sum(axis=0) + last * beyond.sum(axis=0)


def solarize(image: jax.Array, threshold: float = 128 / 255) -> jax.Array:
    """Inverts the values of [H, W, 3] in [0, 1] that are not below `threshold`."""
    return jnp.where(image < threshold, image, 1 - image)


def draw_view(key: jax.Array, image: jax.Array, extent: jax.Array, view: View) -> jax.Array:
    """Draws one crop of [H, W, 3], uint8 or float in [0, 1], as float32 [size, size, 3] in [0, 1].

    `extent` = (h, w): only the first h rows and w columns are image, and nothing else is seen.
    Raises ValueError for images of another kind.
    """
    numbers = jax.random.uniform(key, (_BOX + _LOOK,))
    return _outer(_draw(numbers, _inner(_to_float(image)), extent, view))


def draw_fields(
    key: jax.Array, fields: Mapping[str, jax.Array], extent: jax.Array, view: View
) -> dict[str, jax.Array]:
    """`draw_view` of an example's image, and its other fields in the same crop.

    They follow their geometry (`geometry.FIELDS`): masks and instances are resampled to the nearest pixel,
    as [size, size], and boxes are clipped to the crop.
    """
    numbers = jax.random.uniform(key, (_BOX + _LOOK,))
    top, left, height, width = _crop_box(numbers[:_BOX], extent, view.scale, view.ratio)
    flip = _happens(view.flip, numbers[_BOX])
    size = (view.size, view.size)
    scale = (view.size / height, view.size / width)
    middles = jnp.arange(view.size) + 0.5
    rows = top + jnp.floor(middles / scale[0]).astype(jnp.int32)
    columns = left + jnp.floor(middles / scale[1]).astype(jnp.int32)

    def cropped(name, value):
        kind = geometry.field(name).geometry
        if kind == "bilinear":
            return draw_view(key, value, extent, view)
        if kind == "nearest":
            value = value[rows][:, columns]
        if kind == "boxes":
            shift = (-top * scale[0], -left * scale[1])
            value = geometry.move_boxes(value, scale, shift, size, jnp)
        return jnp.where(flip, geometry.flip(name, value, size, jnp), value) if kind else value

    return {name: cropped(name, value) for name, value in fields.items()}


def draw_views(
    keys: jax.Array, images: jax.Array, extents: jax.Array, views: Sequence[View]
) -> list[jax.Array]:
    """Draws every view of every example: a list of float32 [B, size, size, 3] in the views' order.

    Takes B keys, [B, H, W, 3] images (uint8 or float in [0, 1]) and int [B, 2] extents. View v of
    an example is `draw_view` under fold_in(example's key, v), whatever else is in the batch (up to
    the rounding of float32). Raises ValueError for images of another kind.
    """
    places: dict[View, list[int]] = {}
    for place, view in enumerate(views):
        places.setdefault(view, []).append(place)

    def example(key, image, extent):
        x = _inner(_to_float(image))
        view_keys = jax.vmap(functools.partial(jax.random.fold_in, key))(jnp.arange(len(views)))
        numbers = jax.vmap(lambda k: jax.random.uniform(k, (_BOX + _LOOK,)))(view_keys)
        drawn = [None] * len(views)
        for view, at in places.items():
            # Equal views are one program run one after the other: on CPUs twice as fast as at once,
            # where the products cost transposes, and with a fraction of the memory.
            draw = functools.partial(_draw, x=x, extent=extent, view=view)
            crops = jax.lax.map(lambda n, draw=draw: _outer(draw(n)), numbers[jnp.array(at)])
            for i, place in enumerate(at):
                drawn[place] = crops[i]
        return drawn

    return jax.vmap(example)(keys, images, extents)


def _draw(numbers: jax.Array, x: jax.Array, extent: jax.Array, view: View) -> jax.Array:
    """One crop of [H, 3, W] as [size, 3, size], from numbers of U(0, 1).

    They come from one call of the generator, since each call takes a while to compile, and each has
    its place, so that changing one probability changes nothing else.
    """
    box = _crop_box(numbers[:_BOX], extent, view.scale, view.ratio)
    flip, jitter, gray, blur, sigma, solar, *colour = numbers[_BOX:]
    flip = _happens(view.flip, flip)
    x = _resized_crop(x, box, view.size, flip=flip)
    x = _sometimes(view.jitter, jitter, x, lambda: _jitter(x, colour, view))
    x = _sometimes(view.gray, gray, x, lambda: _blend(x, 0.0, 0.0, 1.0))
    radius = math.ceil(4 * view.blur_sigma[1])
    sigma = _between(view.blur_sigma, sigma)
    x = _sometimes(view.blur, blur, x, lambda: _gaussian_blur(x, sigma, radius))
    return _sometimes(view.solarize, solar, x, lambda: solarize(x))


def _happens(probability: float, number: jax.Array) -> jax.Array | bool:
    """Whether it does, by a number from U(0, 1); a certain outcome is settled while tracing."""
    return number < probability if 0 < probability < 1 else probability == 1


def _sometimes(
    probability: float, number: jax.Array, x: jax.Array, change: Callable[[], jax.Array]
) -> jax.Array:
    """change() if it happens, else x."""
    happens = _happens(probability, number)
    if isinstance(happens, bool):
        return change() if happens else x
    return jnp.where(happens, change(), x)


def _jitter(x: jax.Array, numbers: Sequence[jax.Array], view: View) -> jax.Array:
    """Brightness, contrast, saturation and hue in random order, as torchvision's ColorJitter.

    The first three are one formula with different numbers, so they may swap places at no cost. Hue
    has a fixed place between two rounds of them; whichever belongs to the other round has factor 1.
    """
    steps, place, shift = _jitter_plan(numbers, view)
    if not view.hue:
        return functools.reduce(lambda x, step: _blend(x, *step), steps, x)
    for after in (False, True):
        for i, (factor, mean, pixel) in enumerate(steps):
            x = _blend(x, jnp.where((place <= i) == after, factor, 1.0), mean, pixel)
        x = x if after else _adjust_hue(x, shift)
    return x


def _jitter_plan(
    numbers: Sequence[jax.Array], view: View
) -> tuple[list[tuple[jax.Array, ...]], jax.Array, jax.Array]:
    """From six numbers of U(0, 1): `_blend`'s arguments in order, hue's place in it, hue's shift."""
    order, place, turn, *factors = numbers
    kinds = [
        (_between((max(0.0, 1 - largest), 1 + largest), number), mean, pixel)
        for largest, number, mean, pixel in (
            (view.brightness, factors[0], 0.0, 0.0),
            (view.contrast, factors[1], 1.0, 0.0),
            (view.saturation, factors[2], 0.0, 1.0),
        )
        if largest
    ]
    orders = np.array(list(itertools.permutations(range(len(kinds)))), np.int32)
    order = jnp.asarray(orders)[_whole(order, len(orders))]
    columns = [jnp.stack(jnp.broadcast_arrays(*c)) for c in zip(*kinds, strict=True)]
    steps = [tuple(column[i] for column in columns) for i in order]
    return steps, _whole(place, len(kinds) + 1), _between((-view.hue, view.hue), turn)


def _between(bounds: tuple[float, float], number: jax.Array) -> jax.Array:
    """Maps U(0, 1) to U(low, high)."""
    return bounds[0] + (bounds[1] - bounds[0]) * number


def _whole(number: jax.Array, n: jax.Array | int) -> jax.Array:
    """Maps U(0, 1) to the whole numbers below n."""
    return jnp.floor(number * n).astype(jnp.int32)


def _luma(x: jax.Array) -> jax.Array:
    return (x * jnp.array([[0.299], [0.587], [0.114]])).sum(1, keepdims=True)


def _clip(x: jax.Array) -> jax.Array:
    return jnp.clip(x, 0.0, 1.0)


def _to_float(image_HxWx3: jax.Array) -> jax.Array:
    shape, dtype = image_HxWx3.shape, image_HxWx3.dtype
    if len(shape) != 3 or shape[2] != 3:
        raise ValueError(f"an image is of shape {shape}: allowed is [H, W, 3]")
    if dtype == jnp.uint8:
        return image_HxWx3.astype(jnp.float32) / 255
    if not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(f"an image is of {dtype}: allowed are uint8 and floating point")
    return image_HxWx3.astype(jnp.float32)


def _inner(image_HxWx3: jax.Array) -> jax.Array:
    return jnp.swapaxes(image_HxWx3, 1, 2)


def _outer(x_Hx3xW: jax.Array) -> jax.Array:
    return jnp.swapaxes(x_Hx3xW, 1, 2)
