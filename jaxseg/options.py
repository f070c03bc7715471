"""Options: the fields of a class that a config may set, with what is allowed beside each default.

A class that is made from a config section is a dataclass (Flax modules are), and its fields made by
`option` are the keys of that section. So a module is the only list of its own options.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

_KEY = "option"
_SAME: Any = object()


@dataclasses.dataclass(frozen=True)
class Option:
    """A value that a config may set.

    Attributes:
      default: what it is unless it is set; its type is the type that is allowed.
      help: one line for people.
      low, high: what numbers (each one of a tuple) lie between, both allowed; None for no limit.
      choices: the values that are allowed (each one of a tuple); () for any.
      multiple: numbers are multiples of it; 0 for any.
      length: how many values a tuple holds; None for any number, also none.
      neutral: what a stored config that lacks the key is read with: what the code did before the
        option was added, if that is not `default`.
      free: whether a run may go on with another value, since no step depends on it.
      open: whether evaluation, prediction and comparison may take another value than the run's.
    """

    default: Any
    help: str = ""
    low: float | None = None
    high: float | None = None
    choices: tuple[Any, ...] = ()
    multiple: int = 0
    length: int | None = None
    neutral: Any = _SAME
    free: bool = False
    open: bool = False

    @property
    def before(self) -> Any:
        """The value in runs that were begun before there was this option."""
        return self.default if self.neutral is _SAME else self.neutral

    def allowed(self) -> str:
        """What values may be, for people."""
        if self.choices:
            text = ", ".join(str(c) if c != "" else "nothing" for c in self.choices)
        elif self.low is not None and self.high is not None:
            text = f"{self.low} to {self.high}"
        elif self.low is not None:
            text = f"{self.low} or more"
        elif self.high is not None:
            text = f"at most {self.high}"
        else:
            text = {str: "any text"}.get(type(self.default), type(self.default).__name__)
        if self.multiple:
            text += f", multiples of {self.multiple}"
        if isinstance(self.default, tuple):
            count = "any number of values" if self.length is None else f"{self.length} values"
            text = f"{count}, each {text}" if text != "tuple" else count
        return text

    def fits(self, value: Any) -> bool:
        """Whether `value` is allowed."""
        if isinstance(self.default, tuple):
            if not isinstance(value, tuple | list):
                return False
            if self.length is not None and len(value) != self.length:
                return False
            return all(self._one_fits(v) for v in value)
        return self._one_fits(value)

    def _one_fits(self, value: Any) -> bool:
        if self.choices:
            return value in self.choices
        if self.low is None and self.high is None and not self.multiple:
            return True
        # Whole numbers where the default is one, or holds some.
        like = self.default[0] if isinstance(self.default, tuple) and self.default else self.default
        kinds = (int,) if isinstance(like, int) else (int, float)
        if isinstance(value, bool) or not isinstance(value, kinds):
            return False
        # Not the other way round, which would let NaN pass.
        inside = (self.low is None or value >= self.low) and (
            self.high is None or value <= self.high
        )
        return inside and value == value and not (self.multiple and value % self.multiple)


def option(default: Any, help: str = "", **rules: Any) -> Any:
    """A dataclass field that a config may set; the arguments are those of `Option`."""
    found = Option(default, help, **rules)
    return dataclasses.field(default=default, metadata={_KEY: found})


def options(cls: Any) -> dict[str, Option]:
    """The options of a dataclass, by field, in order."""
    return {f.name: f.metadata[_KEY] for f in dataclasses.fields(cls) if _KEY in f.metadata}


def defaults(found: Mapping[str, Option]) -> dict[str, Any]:
    """The default of each option."""
    return {name: o.default for name, o in found.items()}
