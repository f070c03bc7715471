"""Options: what fits, what is said of it, and which fields of a class are options."""

import dataclasses
import math

import flax.linen as nn
import pytest

from jaxseg.options import Option, OptionError, check, defaults, listed, option, options

NUMBERS = Option(0.5, low=0, high=1)
COUNT = Option(4, low=1)
EVEN = Option(8, low=8, high=64, multiple=8)
NAME = Option("sgd", choices=("sgd", "adam"))
MAYBE = Option("", choices=("", "a"))
SIZE = Option((0, 0), low=0, length=2)
WIDTHS = Option((16, 32), low=1, whole=True, least=1)
WHOLE = Option((), low=0, high=9, whole=True)
AXES = Option((), choices=("h", "w"))
TEXT, SWITCH = Option("anything"), Option(False)


@pytest.mark.parametrize(
    ("one", "values", "refused"),
    [
        (NUMBERS, [0, 1, 0.25], [-0.1, 1.1, math.nan, "0.5", True, None, (0.5,)]),
        (COUNT, [1, 10**9], [0, 1.5, 2.0, True, math.inf]),
        (EVEN, [8, 64], [4, 12, 72, 8.0]),
        (Option(1.0, high=2), [-math.inf, 2], [3, math.nan]),
        (NAME, ["adam"], ["lion", "", 0]),
        (MAYBE, ["", "a"], ["b"]),
        (SIZE, [(0, 0), [3, 4]], [(1,), (1, 2, 3), 5, (1, -1), (1.5, 2), "ab"]),
        (WIDTHS, [(1,), [8, 8, 8]], [(), (0,), (2.0,), 16]),
        (WHOLE, [(), (0, 9)], [(1.0,), (0.5,)]),
        (AXES, [(), ("h",), ["w", "h", "h"]], [("x",), "h"]),
        (TEXT, ["", "x"], []),
        (SWITCH, [True, False], []),
    ],
)
def test_what_fits(one, values, refused):
    assert one.fits(one.default)
    assert [v for v in values if not one.fits(v)] == []
    assert [v for v in refused if one.fits(v)] == []


@pytest.mark.parametrize(
    ("one", "text"),
    [
        (NUMBERS, "0 to 1"),
        (COUNT, "1 or more"),
        (Option(1.0, high=2), "at most 2"),
        (EVEN, "8 to 64, multiples of 8"),
        (NAME, "sgd, adam"),
        (MAYBE, "nothing, a"),
        (SIZE, "2 values, each 0 or more"),
        (WIDTHS, "1 or more values, each 1 or more"),
        (AXES, "0 or more values, each h, w"),
        (Option((), length=3), "3 values"),
        (TEXT, "any text"),
        (SWITCH, "bool"),
    ],
)
def test_what_is_said_of_it(one, text):
    assert one.allowed() == text


def test_runs_of_before_it():
    assert Option(3).before == 3
    assert Option(3, neutral=0).before == 0
    assert Option(3, neutral=None).before is None


def test_the_fields_made_by_option_are_the_options():
    class Module(nn.Module):
        outputs: int = 1
        width: int = option(8, "channels", low=1)

    @dataclasses.dataclass(frozen=True)
    class Narrow:
        width: int = option(8, low=1)
        depth: int = option(2, free=True)

    @dataclasses.dataclass(frozen=True)
    class Wide(Narrow):
        width: int = option(64, low=32)

    assert options(Module) == {"width": Option(8, "channels", low=1)}
    assert Module().width == 8 and Module(width=9).width == 9
    assert options(Wide) == {"width": Option(64, low=32), "depth": Option(2, free=True)}
    assert defaults(options(Wide)) == {"width": 64, "depth": 2}
    assert options(Wide()) == options(Wide)


@dataclasses.dataclass
class Crop:
    size: int = option(32, low=8, high=64)
    share: tuple[float, float] = option((0.5, 1.0), length=2, low=0, high=1)
    seen: int = -1  # no option


def test_values_of_an_object_are_checked():
    check(Crop())
    check(Crop(64, [0, 1], seen=-9))
    with pytest.raises(OptionError, match="^size is 4; allowed: 8 to 64$"):
        check(Crop(4, (2, 2)))
    with pytest.raises(
        OptionError, match="^views.share is .2, 2.; allowed: 2 values, each 0 to 1$"
    ):
        check(Crop(4, (2, 2)), "views.", leave_out=("size",))


def test_what_a_class_imports_is_listed_in_order():
    class Lines:
        from math import e as z
        from math import tau as a

    assert list(listed(Lines).items()) == [("z", math.e), ("a", math.tau)]
