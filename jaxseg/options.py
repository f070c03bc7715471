"""Options: the fields of a class that a config may set, with what is allowed beside each default.

A class that is made from a config section is a dataclass (Flax modules are), and its fields made by
`option` are the keys of that section. So a module is the only list of its own options.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

_KEY = "option"
_SAME: Any = object()


class OptionError(ValueError):
    """A value that is not allowed.

    The message begins with the field's name (`freeze is 9; allowed: 0 to 4`), so that whoever made the
    object from a config can put the name of the section before it.
    """


@dataclasses.dataclass(frozen=True)
class Option:
    """A value that a config may set.

    Attributes:
      default: what it is unless it is set; its type is the type that is allowed.
      help: one line for people.
      low, high: what numbers (each one of a tuple) lie between, both allowed; None for no limit.
      choices: the values that are allowed (each one of a tuple); () for any.
      multiple: numbers are multiples of it; 0 for any.
      whole: numbers are whole ones, where the default does not tell.
      length: how many values a tuple holds; None for any number.
      least: how many it holds at least.
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
    whole: bool = False
    length: int | None = None
    least: int = 0
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
            count = f"{self.length} values" if self.length else f"{self.least} or more values"
            text = f"{count}, each {text}" if text != "tuple" else count
        return text

    def fits(self, value: Any) -> bool:
        """Whether `value` is allowed."""
        if isinstance(self.default, tuple):
            if not isinstance(value, tuple | list):
                return False
            if len(value) < self.least or self.length not in (None, len(value)):
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
        kinds = (int,) if self.whole or isinstance(like, int) else (int, float)
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


def check(made: Any, section: str = "", *, leave_out: tuple[str, ...] = ()) -> None:
    """Checks the options of an object that was made without a config.

    Raises:
      OptionError: for the first value that is not allowed, with `section` before its name.
    """
    for name, one in options(type(made)).items():
        value = getattr(made, name)
        if name not in leave_out and not one.fits(value):
            raise OptionError(f"{section}{name} is {value!r}; allowed: {one.allowed()}")


def listed(lines: type) -> dict[str, Any]:
    """What the body of a class imports, by the names that it gets there, in order.

    So an entry of a registry is one line, which says the name in configs and where the thing is.
    """
    return {name: value for name, value in vars(lines).items() if not name.startswith("__")}


def defaults(found: Mapping[str, Option]) -> dict[str, Any]:
    """The default of each option."""
    return {name: o.default for name, o in found.items()}
