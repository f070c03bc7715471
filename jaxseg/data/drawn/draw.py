"""Light, textures and painting of the procedural data set `shapes`.

A `Canvas` is painted from back to front; for each pixel it remembers the item on top, so that
masks follow occlusion exactly. Colours are planes, 3xHxW, which NumPy blends fastest.
"""

import dataclasses
import functools
import math

import numpy as np

from jaxseg.data.drawn.forms import Array, Dice, Shape

PALETTE = np.array(
    [
        (242, 95, 76), (255, 142, 60), (250, 192, 61), (250, 232, 155), (168, 208, 96),
        (72, 168, 104), (38, 128, 122), (78, 197, 193), (102, 178, 232), (52, 108, 196),
        (48, 62, 128), (122, 98, 196), (186, 126, 206), (238, 130, 168), (214, 62, 104),
        (142, 44, 72), (166, 102, 62), (222, 176, 128), (246, 240, 226), (66, 62, 84),
    ],
    np.float32,
).reshape(-1, 3, 1, 1) / np.float32(255)  # fmt: skip
TEXTURES = ("stripes", "bands", "spots", "scales", "marble", "net", "speckle", "fade", "halves")
GROUNDS = ("water", "ripples", "marble", "bands", "gravel")


def wave(x: Array) -> Array:
    """About sin(2 pi x), from parabolas."""
    f = x - np.floor(x + 0.5)
    return 8.0 * f * (1.0 - 2.0 * np.abs(f))


def ramp(x: Array) -> Array:
    return np.minimum(np.maximum(x + 0.5, 0.0), 1.0)


def blend(a, b, weight: Array) -> Array:
    return a + weight * (b - a)


@functools.lru_cache(maxsize=2)
def noise_tiles(unit: float, units: int) -> dict[str, Array]:
    """Periodic noise about in [-1, 1], two periods a side: any window of one period is a slice."""
    dice, side = Dice(2718), round(units * unit)

    def octave(cell: float) -> Array:
        n = round(units / cell)
        grid = (2.0 * dice.many(n * n) - 1.0).astype(np.float32).reshape(n, n)
        at = np.arange(side, dtype=np.float32) * np.float32(n / side)
        low = np.minimum(np.floor(at).astype(np.int64), n - 1)
        t = at - low.astype(np.float32)
        t, high = t * t * (3.0 - 2.0 * t), (low + 1) % n
        rows = grid[low] + t[:, None] * (grid[high] - grid[low])
        return rows[:, low] + t * (rows[:, high] - rows[:, low])

    tiles = {
        "soft": octave(32) + 0.6 * octave(16) + 0.35 * octave(8),
        "fine": 0.8 * octave(8) + 0.8 * octave(4) + 0.6 * octave(2),
        "grain": octave(1),
    }
    return {name: np.tile(tile, (2, 2)) for name, tile in tiles.items()}


@dataclasses.dataclass(frozen=True)
class Skin:
    """How a surface is coloured; nothing in it depends on the kind of the object."""

    base: Array
    accent: Array
    texture: str
    rate: float
    angle: float
    amount: float
    gloss: float


@dataclasses.dataclass(frozen=True)
class Pose:
    """Where an object lies: centre (x, y) and scale in units, angle in radians."""

    centre: tuple[float, float]
    scale: float
    angle: float
    flip: bool
    bend: float


def draw_skin(dice: Dice, ground: Array) -> Skin:
    def jitter(colour):
        return colour + (0.12 * dice.many(3) - 0.06).astype(np.float32).reshape(3, 1, 1)

    base = jitter(ground if dice.chance(0.05) else dice.pick(PALETTE))
    return Skin(
        base=base,
        accent=jitter(dice.pick(PALETTE)),
        texture=dice.pick(TEXTURES),
        rate=dice.uniform(1.2, 2.6),
        angle=dice.uniform(0, math.pi),
        amount=dice.uniform(0.55, 1.0),
        gloss=dice.uniform(0.0, 0.45),
    )


def texture(skin: Skin, x: Array, y: Array, soft: Array, fine: Array) -> Array:
    """Weight of the accent colour at local coordinates x, y."""
    c, s, f = math.cos(skin.angle), math.sin(skin.angle), skin.rate
    match skin.texture:
        case "stripes":
            return ramp(3.0 * wave(f * x + 0.2 * soft) - 0.5)
        case "bands":
            return ramp(3.0 * wave(f * (c * x + s * y)))
        case "spots" | "scales":
            v = 1.6 * f * y
            row = np.floor(v)
            u = 1.6 * f * x + 0.5 * row
            u, v = u - np.floor(u) - 0.5, v - row - 0.5
            if skin.texture == "spots":
                return ramp(6.0 * (0.3 - np.sqrt(u * u + v * v)))
            return np.minimum(1.3 * (u * u + (v + 0.5) * (v + 0.5)), 1.0)
        case "marble":
            return ramp(2.5 * soft)
        case "net":
            return ramp(6.0 * (0.22 - np.abs(soft)))
        case "speckle":
            return ramp(4.0 * (fine - 0.35))
        case "fade":
            return ramp(0.7 * (c * x + s * y))
        case "halves":
            return ramp(5.0 * (y + 0.15 * soft))


class Canvas:
    """An image being painted, float32 RGB, and the number of the item on top of each pixel."""

    def __init__(self, dice: Dice, size: tuple[int, int]):
        height, width = size
        self.unit = min(size) / 128
        self.height, self.width = height / self.unit, width / self.unit
        self.tiles = noise_tiles(self.unit, 128 * (1 + math.ceil(max(size) / min(size))))
        self.xs = ((np.arange(width) + 0.5) / self.unit).astype(np.float32)
        self.ys = ((np.arange(height) + 0.5) / self.unit).astype(np.float32)
        self.owner = np.zeros(size, np.int16)
        turn, tilt = dice.uniform(0, 2 * math.pi), dice.uniform(0.55, 0.8)
        self.light = (tilt * math.cos(turn), tilt * math.sin(turn), math.sqrt(1 - tilt * tilt))
        self.image = self._ground(dice)

    def noise(self, dice: Dice, name: str, shape: tuple[int, int]) -> Array:
        tile = self.tiles[name]
        y, x = (int(dice.uniform() * (side // 2)) for side in tile.shape)
        return tile[y : y + shape[0], x : x + shape[1]]

    def _ground(self, dice: Dice) -> Array:
        size = self.owner.shape
        soft, fine = self.noise(dice, "soft", size), self.noise(dice, "fine", size)
        turn, rate = dice.uniform(0, 2 * math.pi), dice.uniform(0.04, 0.09)
        along = math.cos(turn) * self.xs + (math.sin(turn) * self.ys)[:, None]
        k = dice.integer(0, len(PALETTE) - 1)
        step = dice.integer(1, 3) if dice.chance(0.75) else dice.integer(4, 10)
        towards, much = (1.0, 0.3) if dice.chance(0.35) else (0.05, dice.uniform(0.15, 0.5))
        first, second = (
            c + np.float32(much) * (np.float32(towards) - c)
            for c in (PALETTE[k], PALETTE[(k + step) % len(PALETTE)])
        )
        self.colour = first
        fade = ramp((along - 0.5 * (along[0, 0] + along[-1, -1])) / 190)
        match dice.pick(GROUNDS):
            case "water":
                weight = 0.75 * fade + 0.3 * ramp(4.0 * (0.05 - np.abs(soft)))
            case "ripples":
                weight = 0.6 * fade + 0.25 * wave(rate * along + 0.3 * soft) + 0.1 * fine
            case "marble":
                weight = 0.3 * fade + 0.7 * ramp(1.1 * soft + 0.25 * fine)
            case "bands":
                weight = 0.3 * fade + 0.6 * ramp(4.0 * wave(0.6 * rate * along + 0.15 * soft))
            case "gravel":
                weight = 0.4 * fade + 0.5 * ramp(1.6 * (fine + 0.3 * soft))
        return blend(first, second, 0.7 * weight) * (1.0 + 0.07 * soft + 0.05 * fine)

    def paint(self, dice: Dice, shape: Shape, skin: Skin, pose: Pose, number: int, keep) -> int:
        """Paint one item and return its visible pixels; 0 if `keep(window, inside)` refuses it."""
        centre, scale = pose.centre, pose.scale
        reach = shape.reach * scale + 6.0
        window = tuple(
            slice(*np.searchsorted(axis, (c - reach, c + reach)))
            for axis, c in ((self.ys, centre[1]), (self.xs, centre[0]))
        )
        dx = ((self.xs[window[1]] - centre[0]) / scale).astype(np.float32)
        dy = ((self.ys[window[0]] - centre[1]) / scale).astype(np.float32)[:, None]
        if dx.size < 3 or dy.size < 3:
            return 0
        c, s = math.cos(pose.angle), math.sin(pose.angle)
        x, y = c * dx + s * dy, c * dy - s * dx
        y = (-y if pose.flip else y) + pose.bend * (x * x - 0.3)
        body, fins = shape.distance(x, y)
        outline = body if fins is None else np.minimum(body, fins)
        inside = outline <= 0
        if not keep(window, inside):
            return 0
        pixel = scale * self.unit
        self._shadow(window, outline * scale)
        colour = self._colour(dice, skin, shape, x, y, body, fins, pixel)
        region = self.image[:, *window]
        region += ramp(-outline * pixel) * (colour - region)
        self.owner[window][inside] = number
        return int(np.count_nonzero(inside))

    def _shadow(self, window, outline: Array) -> None:
        """A soft shadow, displaced away from the light; it falls on all painted so far."""
        move = [-round(3.5 * self.unit * self.light[k]) for k in (1, 0)]
        ends = [
            (max(w.start + m, 0), min(w.stop + m, n))
            for w, m, n in zip(window, move, self.owner.shape, strict=True)
        ]
        source = tuple(
            slice(lo - m - w.start, hi - m - w.start)
            for (lo, hi), m, w in zip(ends, move, window, strict=True)
        )
        target = tuple(slice(lo, hi) for lo, hi in ends)
        self.image[:, *target] *= 1.0 - 0.4 * ramp(-0.22 * outline[source] - 0.1)

    def _colour(self, dice, skin, shape, x, y, body, fins, pixel) -> Array:
        soft, fine = (self.noise(dice, name, x.shape) for name in ("soft", "fine"))
        weight = skin.amount * texture(skin, x, y, soft, fine)
        depth = np.minimum(np.maximum(body / -shape.bevel, 0.0), 1.0)
        flat = 1.0 - depth
        slope = np.zeros_like(body)
        slope[:, 1:-1] += (0.5 * pixel * self.light[0]) * (body[:, 2:] - body[:, :-2])
        slope[1:-1] += (0.5 * pixel * self.light[1]) * (body[2:] - body[:-2])
        facing = flat * slope + np.sqrt(depth * (2.0 - depth)) * self.light[2]
        shade = 0.66 + 0.5 * facing + 0.05 * fine
        shine = np.maximum(facing - 0.8, 0.0) * 5.0
        colour = blend(skin.base, skin.accent, weight)
        if shape.mark is not None:
            colour = blend(colour, 0.85 * skin.accent, 0.7 * ramp(-pixel * shape.mark(x, y)))
        if fins is not None:
            outside = ramp(body * pixel)
            rays = wave(3.5 * y / (0.35 + np.abs(x + 0.2)))
            colour = blend(colour, 0.3 * skin.base + 0.7 * skin.accent, outside)
            shade += outside * (0.9 + 0.24 * rays + 0.4 * fins - shade)
            shine *= 1.0 - outside
        colour *= shade
        colour += skin.gloss * shine * shine
        if shape.eye is not None:
            ex, ey, r = shape.eye
            away = np.sqrt((x - ex) * (x - ex) + (y - ey) * (y - ey))
            colour = blend(colour, np.float32(0.95), ramp((r - away) * pixel))
            colour = blend(colour, np.float32(0.06), ramp((0.6 * r - away) * pixel))
        return colour

    def finish(self, dice: Dice) -> Array:
        """Light that falls off across the image, a vignette, grain; uint8."""
        u, v = self.xs / self.width - 0.5, (self.ys / self.height - 0.5)[:, None]
        light = 1.0 + 0.3 * (self.light[0] * u + self.light[1] * v)
        light = light - 0.35 * (u * u + v * v)
        image = self.image * light
        image += 0.014 * self.noise(dice, "grain", self.owner.shape)
        image = (np.minimum(np.maximum(image, 0.0), 1.0) * 255.0 + 0.5).astype(np.uint8)
        return np.ascontiguousarray(image.transpose(1, 2, 0))
