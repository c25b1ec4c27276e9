"""The search space: options of a recipe's steps, each with a range or with choices.

    STEP[#N].OPTION=LOW..HIGH[:log][:int][:STEP]      STEP[#N].OPTION=a|b|c

STEP is the name of a step of the recipe (`do`), `#2` the second of that name. What a parameter
is called is what stands before the `=`; choices are known by their text, so that a parameter is
always a number or a string.
"""

from __future__ import annotations

import itertools
import re
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from decimal import Decimal, InvalidOperation
from typing import Any

from penjing.errors import UsageError
from penjing.recipe import Recipe

__all__ = ["Axis", "Params", "Space", "parse"]

Params = Mapping[str, float | str]

_HEAD = re.compile(r"([a-z_]+)(?:#([0-9]+))?\.([A-Za-z_]\w*)=(.*)", re.DOTALL)
_NUMBER = r"[-+]?[0-9]*\.?[0-9]+(?:[eE][-+]?[0-9]+)?"
_RANGE = re.compile(rf"({_NUMBER})\.\.({_NUMBER})((?::[^:|]+)*)")
_FORM = "STEP.OPTION=LOW..HIGH[:log|:int|:STEP] or STEP.OPTION=a|b|c"


@dataclass(frozen=True)
class Axis:
    """One option and what it may be.

    Attributes:
        name: of the parameter, e.g. `quantize.group` or `cut#2.layers`.
        step: place of the step in the recipe.
        option: field of the step.
        choices: values by their text; empty for a range.
        low, high: ends of a range, both included.
        spacing: of the values of a range, None for all of them.
        log: uniform in the logarithm.
        whole: integers.
    """

    name: str
    step: int
    option: str
    choices: tuple[tuple[str, Any], ...] = ()
    low: float = 0.0
    high: float = 0.0
    spacing: float | None = None
    log: bool = False
    whole: bool = False

    def value(self, parameter: float | str) -> Any:
        """The field's value that a parameter stands for."""
        return dict(self.choices)[str(parameter)] if self.choices else parameter

    def parameter(self, value: Any) -> float | str | None:
        """Inverse of `value`; None where the axis does not have it."""
        if self.choices:
            return next((text for text, own in self.choices if _same(own, value)), None)
        if isinstance(value, bool) or not isinstance(value, int | float):
            return None
        if not self.low <= value <= self.high or (self.whole and value != int(value)):
            return None
        if self.spacing and (_exact(value) - _exact(self.low)) % _exact(self.spacing):
            return None
        return int(value) if self.whole else float(value)

    @property
    def parameters(self) -> list[float | str] | None:
        """All of them where they can be counted, else None."""
        if self.choices:
            return [text for text, _ in self.choices]
        if self.whole:
            return list(range(int(self.low), int(self.high) + 1, int(self.spacing or 1)))
        if self.spacing is None:
            return None
        low, spacing = _exact(self.low), _exact(self.spacing)
        count = int((_exact(self.high) - low) / spacing) + 1
        return [float(low + i * spacing) for i in range(count)]


@dataclass(frozen=True)
class Space:
    """A recipe and the axes along which it is searched."""

    recipe: Recipe
    axes: tuple[Axis, ...]

    def recipe_of(self, params: Params) -> Recipe:
        """The recipe with these values.

        Raises:
            UsageError: a step refuses them.
        """
        options: dict[int, dict[str, Any]] = {}
        for axis in self.axes:
            options.setdefault(axis.step, {})[axis.option] = axis.value(params[axis.name])
        steps = tuple(replace(s, **options.get(i, {})) for i, s in enumerate(self.recipe.steps))
        return replace(self.recipe, steps=steps)

    @property
    def default(self) -> dict[str, float | str] | None:
        """Parameters of the recipe as it is; None where it is not in the space."""
        found: dict[str, float | str] = {}
        for axis in self.axes:
            own = axis.parameter(getattr(self.recipe.steps[axis.step], axis.option))
            if own is None:
                return None
            found[axis.name] = own
        return found

    @property
    def count(self) -> int | None:
        """How many points there are; None for a continuum."""
        total = 1
        for axis in self.axes:
            if (own := axis.parameters) is None:
                return None
            total *= len(own)
        return total

    def points(self) -> Iterator[dict[str, float | str]]:
        """Every point of a space that can be counted."""
        names = [axis.name for axis in self.axes]
        for values in itertools.product(*(axis.parameters or () for axis in self.axes)):
            yield dict(zip(names, values, strict=True))


def parse(recipe: Recipe, search: Sequence[str]) -> Space:
    """The space that lines such as `quantize.group=32|64` describe.

    Raises:
        UsageError: a line of another form, a step or an option that is not there, or values that
            the option cannot have.
    """
    axes = [_axis(recipe, text.strip()) for text in search]
    if not axes:
        raise UsageError("nothing to search", allowed=_FORM, next="give --search")
    places = [(axis.step, axis.option) for axis in axes]
    for axis, place in zip(axes, places, strict=True):
        if places.count(place) > 1:
            raise UsageError("searched twice", got=axis.name, next="give it once")
    return Space(recipe, tuple(axes))


def _axis(recipe: Recipe, text: str) -> Axis:
    found = _HEAD.fullmatch(text)
    if found is None:
        raise UsageError("--search", got=repr(text), allowed=_FORM)
    step, number, option, body = found[1], int(found[2] or 1), found[3], found[4]
    places = [i for i, own in enumerate(recipe.steps) if own.name == step]
    if not 1 <= number <= len(places):
        names = [own.name for own in recipe.steps]
        allowed = [
            name + (f"#{n}" if (n := names[: i + 1].count(name)) > 1 else "")
            for i, name in enumerate(names)
        ]
        got = f"{step}#{number}" if found[2] else step
        raise UsageError(
            "--search names a step that the recipe does not have", got=got,
            allowed=", ".join(allowed) or "none, the recipe has no steps",
        )  # fmt: skip
    kind = type(recipe.steps[places[number - 1]])
    known = [field.name for field in fields(kind)]
    if option not in known:
        raise UsageError(f"step {step} has no option {option}", allowed=", ".join(sorted(known)))
    allowed_types = _types(typing.get_type_hints(kind)[option])
    name = f"{step}#{number}.{option}" if number > 1 else f"{step}.{option}"
    plain = Axis(name, places[number - 1], option)
    numbers = _RANGE.fullmatch(body)
    if numbers and allowed_types & {int, float}:
        return _range(plain, numbers, allowed_types)
    texts = [part.strip() for part in body.split("|")]
    if len(set(texts)) < 2 or len(set(texts)) < len(texts):
        raise UsageError(
            f"--search {name}", got=repr(body),
            allowed="two or more different choices, a|b|c"
            + (", or LOW..HIGH" if allowed_types & {int, float} else ""),
        )  # fmt: skip
    return replace(plain, choices=tuple((t, _typed(name, t, allowed_types)) for t in texts))


def _range(plain: Axis, numbers: re.Match[str], allowed: set[type]) -> Axis:
    low, high = float(numbers[1]), float(numbers[2])
    whole, log, spacing = float not in allowed, False, None
    for flag in filter(None, numbers[3].split(":")):
        if flag == "log":
            log = True
        elif flag == "int":
            whole = True
        elif re.fullmatch(_NUMBER, flag) and float(flag) > 0:
            spacing = float(flag)
        else:
            raise UsageError(
                f"--search {plain.name}", got=f":{flag}", allowed=":log, :int, or a step above 0"
            )

    def refuse(what: str, allowed: str) -> UsageError:
        return UsageError(f"--search {plain.name}", got=what, allowed=allowed)

    if not low < high:
        raise refuse(f"{numbers[1]}..{numbers[2]}", "LOW below HIGH")
    if log and low <= 0:
        raise refuse(f"{numbers[1]}.. with :log", "LOW above 0")
    if log and spacing is not None:
        raise refuse(":log with a step", "one of them")
    if whole and any(v is not None and v != int(v) for v in (low, high, spacing)):
        raise refuse(numbers[0], "whole numbers")
    if spacing is not None and (_exact(high) - _exact(low)) % _exact(spacing):
        raise refuse(numbers[0], "a step that leads from LOW to HIGH")
    if whole:
        low, high, spacing = int(low), int(high), None if spacing is None else int(spacing)
    return replace(plain, low=low, high=high, spacing=spacing, log=log, whole=whole)


def _types(hint: Any) -> set[type]:
    """What a field may be, of an annotation without nested unions."""
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        return {kind for inner in typing.get_args(hint) for kind in _types(inner)}
    return {typing.get_origin(hint) or hint}


def _typed(name: str, text: str, allowed: set[type]) -> Any:
    """The value that a choice's text stands for."""
    if type(None) in allowed and text == "none":
        return None
    if bool in allowed and text in ("true", "false"):
        return text == "true"
    if allowed & {int, float}:
        try:
            exact = Decimal(text)
            # A whole number is one for a float too: a recipe says `bits = 4`.
            if exact.is_finite() and (exact == int(exact) or float in allowed):
                return int(exact) if exact == int(exact) else float(text)
        except InvalidOperation:
            pass
    if tuple in allowed:
        return tuple(part for part in text.split(",") if part)
    if str in allowed:
        return text
    words = {int: "whole numbers", float: "numbers", bool: "true, false", type(None): "none"}
    raise UsageError(
        f"--search {name}", got=repr(text),
        allowed=", ".join(words[kind] for kind in words if kind in allowed),
    )  # fmt: skip


def _same(a: Any, b: Any) -> bool:
    return bool(a == b) and isinstance(a, bool) == isinstance(b, bool)


def _exact(value: float) -> Decimal:
    return Decimal(repr(value))
