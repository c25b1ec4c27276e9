"""Labels as people write them, to integers: names sorted are 0, 1, ..., integers stay."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from penjing.errors import InputError

__all__ = ["integer_labels", "scores"]

_INTEGER = re.compile(r"[+-]?\d{1,18}")


def integer_labels(
    values: Sequence[Any], places: Sequence[str], path: str
) -> tuple[np.ndarray, tuple[str, ...]]:
    """int64 labels [n] and the names of the classes, none when the labels were integers.

    Strings that all look like integers (`"0"`, `"12"`, as CSV has them) are integers.

    Args:
        values: strings or Python numbers without a fraction.
        places: where each came from (`line 3`), for errors.
        path: the file, for errors.

    Raises:
        InputError: a label that is neither, or strings mixed with integers.
    """
    kinds = []
    for value, place in zip(values, places, strict=True):
        if isinstance(value, str) and value.strip():
            kinds.append("a string")
        elif isinstance(value, int | float) and value == value // 1 and abs(value) < 2**63:
            kinds.append("an integer")
        else:
            raise InputError(
                f"{path} {place}: not a label",
                got=repr(value),
                allowed="an integer or a string that is not empty",
            )
        if kinds[-1] != kinds[0]:
            raise InputError(
                f"{path} {place}: labels of two kinds",
                got=f"{kinds[-1]} here, {kinds[0]} at {places[0]}",
                allowed="all strings or all integers",
            )
    if kinds and kinds[0] == "a string":
        names = [str(value).strip() for value in values]
        if not all(_INTEGER.fullmatch(name) for name in names):
            classes = tuple(sorted(set(names)))
            index = {name: i for i, name in enumerate(classes)}
            return np.array([index[name] for name in names], dtype=np.int64), classes
        values = names
    return np.array([int(value) for value in values], dtype=np.int64), ()


def scores(values: Sequence[Any], places: Sequence[str], path: str) -> np.ndarray:
    """float64 [n] of numbers, or of strings that are numbers.

    Raises:
        InputError: one that is not a finite number.
    """
    found = np.empty(len(values), dtype=np.float64)
    for i, (value, place) in enumerate(zip(values, places, strict=True)):
        try:
            found[i] = float(value)
        except (TypeError, ValueError, OverflowError):
            found[i] = np.nan
        if not np.isfinite(found[i]):
            raise InputError(f"{path} {place}: not a score", got=repr(value), allowed="a number")
    return found
