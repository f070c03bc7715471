"""Outlines of the procedural data set `shapes`, as signed distance fields.

Lengths are in units of which the shorter image side has 128. The arrays go only through
arithmetic that IEEE 754 fixes (+ - * / sqrt min max floor) and the random numbers only through
raw PCG64 bits, whose stream NumPy guarantees, so that every machine draws the same picture.
"""

import dataclasses
import functools
import math
from collections.abc import Callable

import numpy as np

Array = np.ndarray


class Dice:
    """Uniform random draws in a fixed order, from a few integers."""

    def __init__(self, *key: int):
        self._bits = np.random.default_rng(key).bit_generator
        self._pool: list[float] = []

    def many(self, n: int) -> Array:
        """n doubles in [0, 1)."""
        return (self._bits.random_raw(n) >> 11) * 2.0**-53

    def uniform(self, low: float = 0.0, high: float = 1.0) -> float:
        if not self._pool:
            self._pool = self.many(512).tolist()
        return low + (high - low) * self._pool.pop()

    def integer(self, low: int, high: int) -> int:
        """An integer in [low, high]."""
        return low + int(self.uniform() * (high - low + 1))

    def chance(self, probability: float) -> bool:
        return self.uniform() < probability

    def pick(self, options):
        return options[self.integer(0, len(options) - 1)]


# Distance fields: negative inside. x points to the nose, y to the belly.


def _length(x: Array, y: Array) -> Array:
    return np.sqrt(x * x + y * y)


def _smooth_min(a: Array, b: Array, k: float) -> Array:
    h = np.maximum(k - np.abs(a - b), 0.0)
    return np.minimum(a, b) - h * h * (0.25 / k)


def _ellipse(x: Array, y: Array, a, b) -> Array:
    u, v = x / a, y / b
    k = _length(u, v)
    return k * (k - 1.0) / (_length(u / a, v / b) + 1e-6)


def _lens(x: Array, y: Array, half_length: float, half_width: float) -> Array:
    """Pointed at both ends: where two equal discs meet."""
    radius = (half_length**2 + half_width**2) / (2 * half_width)
    return _length(x, np.abs(y) + (radius - half_width)) - radius


def _blade(x: Array, y: Array, root, angle: float, length: float, width: float) -> Array:
    """A lens that leaves `root` in the direction `angle`."""
    c, s = math.cos(angle), math.sin(angle)
    x, y = x - root[0], y - root[1]
    return _lens(c * x + s * y - 0.5 * length, c * y - s * x, 0.5 * length, 0.5 * width)


@dataclasses.dataclass(frozen=True)
class Shape:
    """What an object looks like before it is coloured, in its own units.

    `distance(x, y)` -> (body, fins or None); `reach` bounds the radius, `bevel` is the width of
    the rounded rim, `eye` is (x, y, radius), `mark(x, y)` the distance to an inner fin or vein.
    """

    distance: Callable[[Array, Array], tuple[Array, Array | None]]
    reach: float
    bevel: float
    eye: tuple[float, float, float] | None = None
    mark: Callable[[Array, Array], Array] | None = None


def _flap(dice: Dice) -> Callable[[Array, Array], Array]:
    root = (dice.uniform(0.1, 0.3), dice.uniform(0.0, 0.15))
    angle, length = math.pi - dice.uniform(0.1, 0.6), dice.uniform(0.4, 0.6)
    return lambda x, y: _blade(x, y, root, angle, length, 0.5 * length)


def fish(dice: Dice) -> Shape:
    """An egg-shaped body, a forked tail, a fin on the back and one below, an eye."""
    deepest = dice.uniform(0.1, 0.35)
    back, belly = dice.uniform(0.36, 0.6), dice.uniform(0.32, 0.55)
    spread, lobe = dice.uniform(0.45, 0.75), dice.uniform(0.9, 1.2)
    lobe_width = dice.uniform(0.3, 0.42)
    top_x, top_length = dice.uniform(0.0, 0.4), dice.uniform(0.8, 1.2)
    top_width, top_angle = dice.uniform(0.4, 0.6), dice.uniform(0.25, 0.5)
    low_x, low_length = dice.uniform(-0.3, 0.1), dice.uniform(0.55, 0.85)
    low_angle = dice.uniform(0.4, 0.75)

    def distance(x, y):
        x0 = x - deepest
        a = np.where(x0 > 0, np.float32(1 - deepest), np.float32(1 + deepest))
        b = np.where(y > 0, np.float32(belly), np.float32(back))
        body = _smooth_min(_ellipse(x0, y, a, b), _lens(x + 0.95, y, 0.4, 0.17), 0.15)
        tail = _blade(x, np.abs(y), (-0.68, 0.0), math.pi - spread, lobe, lobe_width)
        top = _blade(x, y, (top_x, -0.75 * back), math.pi + top_angle, top_length, top_width)
        low = _blade(x, y, (low_x, 0.7 * belly), math.pi - low_angle, low_length, 0.36)
        return body, np.minimum(tail, np.minimum(top, low))

    eye = (dice.uniform(0.55, 0.66), -dice.uniform(0.12, 0.24) * back, dice.uniform(0.13, 0.17))
    return Shape(distance, 2.1, 0.9 * min(back, belly), eye, _flap(dice))


def leaf(dice: Dice) -> Shape:
    width = dice.uniform(0.32, 0.55)

    def distance(x, y):
        return _smooth_min(_lens(x, y, 1.0, width), _lens(x + 1.05, y, 0.4, 0.06), 0.06), None

    eye = (0.45, -0.1, 0.12) if dice.chance(0.04) else None
    vein = None if dice.chance(0.3) else lambda x, y: _lens(x + 0.1, y, 0.9, 0.045)
    return Shape(distance, 1.5, 0.8 * width, eye, vein)


def weed(dice: Dice) -> Shape:
    """A tuft of blades."""
    blades = [
        (dice.uniform(-0.9, 0.9), dice.uniform(1.0, 1.6), dice.uniform(0.14, 0.3))
        for _ in range(dice.integer(3, 4))
    ]

    def distance(x, y):
        parts = [_blade(x, y, (-0.7, 0.0), *blade) for blade in blades]
        return functools.reduce(np.minimum, parts), None

    return Shape(distance, 1.4, 0.12)


def star(dice: Dice) -> Shape:
    width, core = dice.uniform(0.34, 0.5), dice.uniform(0.2, 0.3)
    c, s = math.cos(math.pi / 5), math.sin(math.pi / 5)

    def distance(x, y):
        x = np.abs(x)  # fold the plane into one of five sectors, its arm along +y
        fold = 2 * np.maximum(c * x - s * y, 0.0)
        x, y = x - fold * c, y + fold * s
        fold = 2 * np.maximum(-c * x - s * y, 0.0)
        x, y = np.abs(x + fold * c), y + fold * s
        return _smooth_min(_lens(y - 0.42, x, 0.62, 0.5 * width), _length(x, y) - core, 0.2), None

    return Shape(distance, 1.2, 0.2, (0.0, 0.0, 0.14) if dice.chance(0.04) else None)


def disc(dice: Dice) -> Shape:
    a, b = dice.uniform(0.6, 0.8), dice.uniform(0.5, 0.8)
    eye = (dice.uniform(0.15, 0.35), -0.1, 0.13) if dice.chance(0.05) else None
    return Shape(lambda x, y: (_ellipse(x, y, a, b), None), 0.95, 0.9 * min(a, b), eye)


def ring(dice: Dice) -> Shape:
    width = dice.uniform(0.12, 0.24)
    return Shape(lambda x, y: (np.abs(_length(x, y) - 0.6) - width, None), 0.9, width)


def crescent(dice: Dice) -> Shape:
    shift, cut = dice.uniform(0.35, 0.55), dice.uniform(0.65, 0.75)

    def distance(x, y):
        return np.maximum(_length(x, y) - 0.85, cut - _length(x + shift, y)), None

    eye = (0.55, -0.25, 0.1) if dice.chance(0.04) else None
    return Shape(distance, 0.95, 0.3, eye)


def box(dice: Dice) -> Shape:
    a, b, r = dice.uniform(0.5, 0.85), dice.uniform(0.3, 0.6), dice.uniform(0.1, 0.25)

    def distance(x, y):
        u, v = np.abs(x) - (a - r), np.abs(y) - (b - r)
        outside = _length(np.maximum(u, 0.0), np.maximum(v, 0.0))
        return outside + np.minimum(np.maximum(u, v), 0.0) - r, None

    eye = (0.5 * a, -0.2 * b, 0.12) if dice.chance(0.04) else None
    return Shape(distance, 1.1, r + 0.1, eye, _flap(dice) if dice.chance(0.3) else None)


def pebble(dice: Dice) -> Shape:
    lumps = [
        (dice.uniform(-0.4, 0.4), dice.uniform(-0.3, 0.3), dice.uniform(0.3, 0.5)) for _ in range(4)
    ]

    def distance(x, y):
        parts = [_length(x - cx, y - cy) - r for cx, cy, r in lumps]
        return functools.reduce(lambda p, q: _smooth_min(p, q, 0.3), parts), None

    eye = (*lumps[0][:2], 0.13) if dice.chance(0.04) else None
    return Shape(distance, 1.15, 0.4, eye)


def drop(dice: Dice) -> Shape:
    radius, tail = dice.uniform(0.42, 0.6), dice.uniform(1.0, 1.3)

    def distance(x, y):
        head = _length(x - 0.4, y) - radius
        return _smooth_min(head, _lens(x + 0.1, y, tail, 0.6 * radius), 0.25), None

    eye = (0.58, -0.12, 0.12) if dice.chance(0.05) else None
    return Shape(distance, 1.5, 0.8 * radius, eye, _flap(dice) if dice.chance(0.2) else None)


def fork(dice: Dice) -> Shape:
    """Two blades; often with the skin of fins, as a tail that has lost its fish."""
    angle, width = dice.uniform(0.45, 0.85), dice.uniform(0.35, 0.5)
    lone_tail = dice.chance(0.3)

    def distance(x, y):
        blades = _blade(x, np.abs(y), (0.5, 0.0), math.pi - angle, 1.4, width)
        return (_length(x - 0.4, y) - 0.1, blades) if lone_tail else (blades, None)

    return Shape(distance, 1.2, 0.1 if lone_tail else 0.2)


DISTRACTORS = (leaf, weed, star, disc, ring, crescent, box, pebble, drop, drop, fork)
