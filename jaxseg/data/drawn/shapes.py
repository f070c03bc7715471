"""The built-in data set `shapes`: find the fish among objects of the same colours and textures.

`Scenes` are the same images with the kind of every object, `Kinds` shoals of one kind each.

Everything is drawn: no file, no network. Example i follows from (seed, split, i) alone.
"""

import dataclasses
import math
import threading
from typing import ClassVar

import numpy as np

from jaxseg.data.drawn import forms
from jaxseg.data.drawn.draw import Canvas, Pose, draw_skin
from jaxseg.data.format import Format
from jaxseg.data.image_files import DataError
from jaxseg.options import option

KINDS = ("fish", *dict.fromkeys(form.__name__ for form in forms.DISTRACTORS))
LENGTHS = {"train": 2000, "val": 200, "test": 300}
CATEGORIES = ("fish",)
SIZE = (128, 128)  # (height, width), unless another is asked for
MEMORY = 512 * 2**20  # bytes of drawn examples that one source keeps


@dataclasses.dataclass(eq=False)
class Shapes(Format):
    """A source of drawn images with exact masks of the fish in them.

    `source[i]` is a dict of image (uint8 HxWx3), mask (uint8 HxW, 1 where a fish is on top),
    category (0) and name.

    Args:
      root: empty.
      part: "train", "val" or "test".
      size: (height, width) of the images; (0, 0) for 128x128.
      categories: empty, or some of `all_categories`, which changes nothing.
      length: how many there are in "train"; 0 for 2000.
      seed: of what is drawn.

    Raises:
      DataError: a root, an unknown split or category, a size below 32 or a negative length.
      IndexError: when asked for an example beyond the end.
    """

    categories: tuple[str, ...] = option((), "names; empty = all", open=True)
    length: int = option(0, "how many are drawn for training; 0 = 2000", low=0, open=True)
    seed: int = 0

    all_categories = CATEGORIES

    gives: ClassVar[frozenset[str]] = frozenset({"binary", "images"})
    drawn: ClassVar[bool] = True

    def __post_init__(self):
        super().__post_init__()
        if str(self.root):
            raise DataError(
                f"data.root is {str(self.root)!r}, but these data draw their own images "
                f"({type(self).__name__.lower()}); to read images from there name another format"
            )
        if self.part not in LENGTHS:
            raise DataError(f"unknown split {self.part!r} of shapes; allowed: {', '.join(LENGTHS)}")
        for name in self.categories:
            if name not in self.all_categories:
                raise DataError(
                    f"unknown category {name!r} of shapes; allowed: {', '.join(self.all_categories)}"
                )
        size = tuple(int(n) for n in self.size)
        size = SIZE if size == (0, 0) else size
        if len(size) != 2 or min(size) < 32:
            raise DataError(f"size of shapes is {size}; allowed: (height, width), both >= 32")
        length = (self.part == "train" and self.length) or LENGTHS[self.part]
        if self.length < 0 or self.seed < 0:
            raise DataError(
                f"length {self.length or length}, seed {self.seed} of shapes; allowed: both >= 0"
            )
        self.categories = self.all_categories
        self._drawn_size, self._length = size, length
        self._room = MEMORY // (4 * math.prod(size))
        self._kept: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> dict:
        index = int(index)
        if not -self._length <= index < self._length:
            raise IndexError(f"example {index} of {self._length} in shapes/{self.part}")
        index %= self._length
        drawn = self._kept.get(index)
        if drawn is None:
            key = (self.seed, list(LENGTHS).index(self.part), index)
            drawn = self._draw(index, forms.Dice(*key))
            with self._lock:
                if len(self._kept) < self._room:
                    self._kept[index] = drawn
        image, mask = drawn
        name = f"{self.part}-{index:05d}"
        category = self._category(index)
        return {"image": image.copy(), "mask": mask.copy(), "category": category, "name": name}

    def sizes(self) -> list[tuple[int, int]]:
        """Every (height, width); nothing is drawn for it."""
        return [self._drawn_size] * len(self)

    def _draw(self, index: int, dice: forms.Dice) -> tuple[np.ndarray, np.ndarray]:
        image, kinds = draw_scene(dice, self._drawn_size)
        return image, (kinds == 1 + KINDS.index("fish")).astype(np.uint8)

    def _category(self, index: int) -> int:
        return 0

    def __getstate__(self):
        return {**self.__dict__, "_kept": {}, "_lock": None}

    def __setstate__(self, state):
        self.__dict__.update(state, _lock=threading.Lock())


class Scenes(Shapes):
    """The images of `Shapes` with the kind of every object: for several classes.

    The mask is 0 (background) and 1 + the place of a kind in `KINDS`.
    """

    all_categories = ("all",)
    gives: ClassVar[frozenset[str]] = frozenset({"classes"})
    names = ("background", *KINDS)

    def _draw(self, index: int, dice: forms.Dice) -> tuple[np.ndarray, np.ndarray]:
        return draw_scene(dice, self._drawn_size)


class Kinds(Shapes):
    """Shoals: the same objects, each image of one kind only. The kind is the category.

    For pretraining and for k-NN, which need an image to have one class. As in pictures of the world
    what lies together is alike, so two crops of an image have the kind in common, and the colour of the
    ground, but hardly anything else: skins, sizes and turns differ from object to object. The mask is 1
    on all objects. Kinds are equally frequent.
    """

    all_categories = KINDS

    def __getitem__(self, index: int) -> dict:
        example = super().__getitem__(index)
        return example | {"name": f"{KINDS[example['category']]}/{example['name']}"}

    def _draw(self, index: int, dice: forms.Dice) -> tuple[np.ndarray, np.ndarray]:
        return draw_kind(dice, self._drawn_size, KINDS[self._category(index)])

    def _category(self, index: int) -> int:
        return index % len(KINDS)


def draw_scene(dice: forms.Dice, size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """One image (uint8 HxWx3) and its mask (uint8 HxW: 0, or 1 + the object's place in `KINDS`)."""
    canvas = Canvas(dice, size)
    lot = dice.uniform()
    fishes = 0 if lot < 0.08 else 1 if lot < 0.5 else 2 if lot < 0.87 else 3
    others = round(canvas.height * canvas.width / 128**2 * dice.uniform(3.8, 6.6))
    items = sorted([True] * fishes + [False] * others, key=lambda _: dice.uniform())
    centres, whole = [], {}  # whole: the number of a fish -> its pixels when painted
    kind = np.zeros(1 + len(items), np.uint8)  # of each number

    def keep(window, inside) -> bool:
        """No item may hide more than 15 % of a fish."""
        top = canvas.owner[window]
        for number, pixels in whole.items():
            covered = np.count_nonzero(inside & (top == number))
            if covered and np.count_nonzero(canvas.owner == number) - covered < 0.85 * pixels:
                return False
        return True

    for number, is_fish in enumerate(items, start=1):
        name = "fish" if is_fish else dice.pick(forms.DISTRACTORS).__name__
        shape = getattr(forms, name)(dice)
        kind[number] = 1 + KINDS.index(name)
        scale = dice.uniform(26, 38) * (1.14 - 0.14 * fishes) if is_fish else dice.uniform(12, 28)
        for _ in range(6):
            pose = _pose(dice, canvas, scale, 0.75 * scale if is_fish else 0.0, centres)
            skin = draw_skin(dice, canvas.colour)
            pixels = canvas.paint(dice, shape, skin, pose, number, keep)
            if pixels:
                centres.append(pose.centre)
                break
        if is_fish and pixels:
            whole[number] = pixels
    return canvas.finish(dice), kind[canvas.owner]


def draw_kind(dice: forms.Dice, size: tuple[int, int], kind: str) -> tuple[np.ndarray, np.ndarray]:
    """One image (uint8 HxWx3) of a shoal, objects of one kind, and their mask (uint8 HxW)."""
    canvas = Canvas(dice, size)
    centres = []
    for number in range(1, 1 + round(canvas.height * canvas.width / 128**2 * dice.uniform(5, 22))):
        scale = dice.uniform(16, 36)
        pose = _pose(dice, canvas, scale, 0.4 * scale, centres)
        skin = draw_skin(dice, canvas.colour)
        shape = getattr(forms, kind)(dice)
        if canvas.paint(dice, shape, skin, pose, number, lambda window, inside: True):
            centres.append(pose.centre)
    return canvas.finish(dice), (canvas.owner > 0).astype(np.uint8)


def _pose(dice: forms.Dice, canvas: Canvas, scale: float, margin: float, centres: list) -> Pose:
    """Of three random places at least `margin` from the border, the one farthest from others."""
    room = canvas.width - margin, canvas.height - margin
    places = [tuple(dice.uniform(margin, end) for end in room) for _ in range(3)]
    centre = max(places, key=lambda p: min((math.dist(p, q) for q in centres), default=0))
    turn, flip = dice.uniform(0, 2 * math.pi), dice.chance(0.5)
    return Pose(centre, scale, turn, flip, bend=dice.uniform(-0.2, 0.2))
