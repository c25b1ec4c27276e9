"""The grammar of the search space, by cases worked out by hand."""

from __future__ import annotations

import dataclasses
import itertools
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest

from penjing.errors import UsageError
from penjing.recipe import Recipe
from penjing.tune.space import Axis, parse


@dataclass(frozen=True)
class Trim:
    """A step with a field of every type that steps have."""

    name: ClassVar[str] = "trim"

    ratio: float = 0.5
    layers: int | None = None
    method: str = "plain"
    rotate: bool = False
    targets: tuple[str, ...] = ()
    bits: float = 8

    def __post_init__(self) -> None:
        if self.ratio > 0.9:
            raise UsageError("ratio", got=self.ratio, allowed="at most 0.9")


@dataclass(frozen=True)
class Train:
    name: ClassVar[str] = "train"

    lr: float = 1e-4
    steps: int = 10


RECIPE = Recipe((Trim(), Train(), Trim(ratio=0.1)), seed=7)


def axis(text: str) -> Axis:
    (found,) = parse(RECIPE, [text]).axes
    return found


@pytest.mark.parametrize(
    ("text", "low", "high", "spacing", "log", "whole"),
    [
        ("train.lr=1e-5..1e-3:log", 1e-5, 1e-3, None, True, False),
        ("train.lr=.1...5", 0.1, 0.5, None, False, False),
        ("trim.ratio=0.1..0.5:0.1", 0.1, 0.5, 0.1, False, False),
        ("trim.ratio=-1..1", -1.0, 1.0, None, False, False),
        ("trim.bits=2..8:int", 2, 8, None, False, True),
        ("train.steps=10..50:20", 10, 50, 20, False, True),
        ("train.steps=1..100:log", 1, 100, None, True, True),
        ("trim.layers=1..4", 1, 4, None, False, True),
    ],
)
def test_ranges(
    text: str, low: float, high: float, spacing: float | None, log: bool, whole: bool
) -> None:
    found = axis(text)
    assert (found.low, found.high, found.spacing, found.log, found.whole) == (
        low, high, spacing, log, whole,
    )  # fmt: skip
    assert found.choices == ()


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("trim.bits=4|8|2.5", [4, 8, 2.5]),
        ("trim.layers=none|2", [None, 2]),
        ("trim.rotate=true|false", [True, False]),
        ("trim.method=plain|own.py:fit", ["plain", "own.py:fit"]),
        ("trim.targets=*up*|*up*,*down*|", [("*up*",), ("*up*", "*down*"), ()]),
        ("train.steps=5 | 10", [5, 10]),
        ("train.lr=1e-4|1e-3", [1e-4, 1e-3]),
    ],
)
def test_choices(text: str, values: list[Any]) -> None:
    found = [value for _, value in axis(text).choices]
    assert found == values
    assert [type(v) for v in found] == [type(v) for v in values]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("trim.ratio", "LOW..HIGH"),
        ("ratio=1..2", "STEP.OPTION"),
        ("cut.ratio=0.1..0.2", "got cut; allowed: trim, train, trim#2"),
        ("trim#3.ratio=0.1..0.2", "got trim#3"),
        ("trim#0.ratio=0.1..0.2", "got trim#0"),
        ("trim.colour=1|2", "no option colour; allowed: bits, layers, method"),
        ("trim.ratio=0.5..0.1", "LOW below HIGH"),
        ("trim.ratio=0.5..0.5", "LOW below HIGH"),
        ("train.lr=0..1:log", "LOW above 0"),
        ("train.lr=0.1..1:log:0.1", "one of them"),
        ("train.lr=0.1..1:exp", "got :exp"),
        ("trim.ratio=0.1..0.5:0.3", "a step that leads from LOW to HIGH"),
        ("train.steps=1.5..4", "whole numbers"),
        ("trim.bits=2..8.5:int", "whole numbers"),
        ("train.steps=1|2.5", "got '2.5'; allowed: whole numbers"),
        ("train.lr=a|b", "allowed: numbers"),
        ("trim.layers=1|x", "allowed: whole numbers, none"),
        ("trim.rotate=yes|no", "allowed: true, false"),
        ("trim.rotate=0..1", "two or more different choices"),
        ("trim.method=plain", "two or more different choices"),
        ("trim.method=a|a", "two or more different choices"),
    ],
)
def test_what_does_not_fit_is_refused(text: str, says: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse(RECIPE, [text])
    assert says in str(caught.value)


def test_one_option_once_and_something_to_search() -> None:
    with pytest.raises(UsageError, match="searched twice"):
        parse(RECIPE, ["trim.ratio=0.1..0.2", "trim#1.ratio=0.3|0.4"])
    with pytest.raises(UsageError, match="nothing to search"):
        parse(RECIPE, [])


def test_a_recipe_of_parameters() -> None:
    lines = ["trim#2.ratio=0.1..0.5", "trim.layers=none|2", "train.steps=10..50:20"]
    space = parse(RECIPE, lines)
    made = space.recipe_of({"trim#2.ratio": 0.25, "trim.layers": "2", "train.steps": 30})
    assert made == Recipe((Trim(layers=2), Train(steps=30), Trim(ratio=0.25)), seed=7)
    # The recipe itself is in the space: layers None, 10 steps, a ratio of 0.1.
    assert space.default == {"trim#2.ratio": 0.1, "trim.layers": "none", "train.steps": 10}
    assert space.recipe_of(space.default) == RECIPE
    assert parse(RECIPE, ["trim.ratio=0.6..0.8"]).default is None
    assert parse(RECIPE, ["trim.ratio=0.1..0.9:0.2"]).default == {"trim.ratio": 0.5}
    assert parse(RECIPE, ["trim.ratio=0.2..0.8:0.2"]).default is None
    # True is no 1.
    assert parse(RECIPE, ["trim.rotate=true|false"]).default == {"trim.rotate": "false"}


def test_values_that_a_step_refuses_are_found_when_it_is_built() -> None:
    space = parse(RECIPE, ["trim.ratio=0.5..0.99"])
    with pytest.raises(UsageError, match=r"at most 0\.9"):
        space.recipe_of({"trim.ratio": 0.95})


def test_points_are_counted_and_listed() -> None:
    lines = ["trim.ratio=0.1..0.5:0.2", "trim.method=a|b", "train.steps=1..3"]
    space = parse(RECIPE, lines)
    by_hand = {*itertools.product([0.1, 0.3, 0.5], ["a", "b"], [1, 2, 3])}
    assert space.count == 18
    assert {tuple(point.values()) for point in space.points()} == by_hand
    assert parse(RECIPE, [*lines, "train.lr=0.1..0.2"]).count is None


def test_the_options_of_all_steps_have_types_that_are_understood() -> None:
    from penjing.api import STEPS
    from penjing.tune.space import _types

    # Of a mapping no values can be typed on a line; none is one.
    known = {int, float, bool, str, tuple, type(None), Mapping}
    for step in STEPS.values():
        hints = typing.get_type_hints(step)
        for field in dataclasses.fields(step):
            assert _types(hints[field.name]) <= known, (step, field.name)
