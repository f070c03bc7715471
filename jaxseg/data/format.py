"""What all data formats have in common: a source of one split, made from the options of a config."""

import dataclasses
import os
from typing import Any, ClassVar, Self


@dataclasses.dataclass(eq=False)
class Format:
    """A `Source` of one split of a data set, which can give the other splits.

    Subclasses are dataclasses whose fields made by `options.option` are the keys of `config.data`.

    Attributes:
      root: where the data are.
      part: the split to read.
      size: (height, width) of the canvas that the images will be fitted into, (0, 0) if it is not
        known: data that are drawn have that size, and JPEGs are decoded no larger than needed.
      gives: what it can be used for: "binary" (masks of one class), "classes" (masks of several) and
        "images" (without their masks).
      section: the subsection of `config.data` with its options; empty for `config.data` itself.
      shared: its options that are in `config.data` in spite of a `section`.
      drawn: whether its images are drawn, so that there is nothing to read.
    """

    root: str | os.PathLike[str] = ""
    part: str = "train"
    size: tuple[int, int] = (0, 0)

    gives: ClassVar[frozenset[str]] = frozenset()
    section: ClassVar[str] = ""
    shared: ClassVar[tuple[str, ...]] = ()
    drawn: ClassVar[bool] = False

    def __post_init__(self):
        # `categories` and `classes` are options, and then what was found.
        self._asked: dict[str, Any] = {
            field.name: getattr(self, field.name) for field in dataclasses.fields(self)
        }

    def split(self, name: str) -> Self:
        """The same data set's split `name`.

        Raises:
          DataError: it has no such split.
        """
        return type(self)(**{**self._asked, "part": name})
