"""Sizes, times and ratios as people write them: `25MB`, `20ms`, `1%`."""

from __future__ import annotations

import math
import re

from penjing.errors import UsageError

__all__ = ["format_size", "format_time", "parse_ratio", "parse_size", "parse_time"]

_SIZES = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12}
_SIZES |= {"kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40}
_TIMES = {"us": 1e-6, "ms": 1e-3, "": 1.0, "s": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0}
_NUMBER = re.compile(r"\s*([0-9]*\.?[0-9]+(?:e[+-]?[0-9]+)?)\s*([a-z%]*)\s*", re.IGNORECASE)


def _split(text: str | float, what: str, example: str) -> tuple[float, str]:
    match = _NUMBER.fullmatch(str(text))
    if not match or not math.isfinite(float(match[1])):
        raise UsageError(f"not a {what}", got=repr(text), allowed=f"a number like {example}")
    return float(match[1]), match[2].lower()


def parse_size(text: str | float) -> int:
    """Bytes of `text`: `25MB` is 25,000,000 and `25MiB` 26,214,400.

    Raises:
        UsageError: `text` is not a size.
    """
    number, unit = _split(text, "size", "25MB")
    if unit not in _SIZES:
        raise UsageError("unknown unit of size", got=repr(text), allowed="B KB MB GB KiB MiB GiB")
    return round(number * _SIZES[unit])


def parse_time(text: str | float) -> float:
    """Seconds of `text`: `20ms` is 0.02, `30m` is 1800, a bare number is seconds.

    Raises:
        UsageError: `text` is not a time.
    """
    number, unit = _split(text, "time", "20ms")
    if unit not in _TIMES:
        raise UsageError("unknown unit of time", got=repr(text), allowed="us ms s m h")
    return number * _TIMES[unit]


def parse_ratio(text: str | float) -> float:
    """Fraction of `text`: `1%` and `0.01` are both 0.01.

    Raises:
        UsageError: `text` is not a ratio.
    """
    number, unit = _split(text, "ratio", "1% or 0.01")
    if unit not in ("", "%"):
        raise UsageError("not a ratio", got=repr(text), allowed="a number like 1% or 0.01")
    return number / 100 if unit == "%" else number


def format_size(count: float) -> str:
    """`count` bytes for people, decimal units: 25000000 is `25.0 MB`."""
    for unit in ("B", "KB", "MB", "GB"):
        if abs(count) < 1000 or unit == "GB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    raise AssertionError("unreachable")


def format_time(seconds: float) -> str:
    """`seconds` for people: 0.02 is `20.0 ms`, 90 is `1 min 30 s`."""
    if seconds < 1e-3:
        return f"{seconds * 1e6:.0f} us"
    if seconds < 1:
        return f"{seconds * 1e3:.1f} ms"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"
