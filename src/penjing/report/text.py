"""Names and numbers as the report shows them: escaped, finite, in the reader's units.

A number that is missing or not finite is a dash, never `nan`.
"""

from __future__ import annotations

import html
import math
from collections.abc import Mapping
from typing import Any

from penjing import units
from penjing.errors import UsageError, printable
from penjing.result import Latency, Result

__all__ = [
    "DASH",
    "amount",
    "call",
    "ceiling",
    "count",
    "drop_amount",
    "finite",
    "is_percent",
    "lines",
    "milliseconds",
    "number",
    "phrase",
    "quality",
    "ratio",
    "safe",
    "size",
    "threads",
]

DASH = "–"
_NOT_PERCENT = ("spearman", "pearson", "correlation", "cosine", "kl", "loss", "similarity")


def safe(value: object, limit: int = 300) -> str:
    """`value` on one line, inert in HTML text and in quoted attributes.

    Control and bidirectional characters become visible escapes.
    """
    return html.escape(printable(str(value).replace("\u00a0", " "), limit), quote=True)


def lines(text: str, limit: int = 200_000) -> str:
    """As `safe`, with the line breaks kept; for text in a `pre`."""
    cut = text if len(text) <= limit else text[:limit] + "\n..."
    return "\n".join(safe(line.replace("\t", "    "), 20_000) for line in cut.splitlines())


def finite(value: object) -> bool:
    """Whether `value` is a number that can be drawn."""
    return isinstance(value, int | float) and math.isfinite(value)


def number(value: float | None, decimals: int = 2) -> str:
    """Plain number; very large and very small ones in powers of ten."""
    if value is None or not finite(value):
        return DASH
    if value and not 1e-3 <= abs(value) < 1e6:
        return f"{value:.2e}".replace("-", "−")
    places = max(decimals, 4) if abs(value) < 0.1 and value else decimals
    text = f"{value:,.{places}f}"
    return text.replace("-", "−") if float(f"{value:.{places}f}") else text.replace("-", "")


def size(count: float | None) -> str:
    """Bytes in decimal units."""
    return DASH if count is None or not finite(count) else _joined(units.format_size(count))


def milliseconds(value: float | None) -> str:
    """A time given in milliseconds."""
    if value is None or not finite(value):
        return DASH
    return _joined(units.format_time(value / 1e3)).replace("us", "µs")


def count(value: float | None) -> str:
    """A number of things: 22,713,216 is `22.7 M`."""
    if value is None or not finite(value):
        return DASH
    for unit, step in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(value) >= step:
            return f"{value / step:,.1f}\u00a0{unit}"
    return f"{value:,.0f}"


def threads(number: int) -> str:
    """`1 thread`, `2 threads`."""
    return f"{number} thread{'' if number == 1 else 's'}"


def call(latency: Latency) -> str:
    """What one call was: `batch 1 × 128 tokens`."""
    length = "" if latency.length is None else f" × {latency.length:,}\u00a0tokens"
    return f"batch\u00a0{latency.batch:,}{length}"


def ratio(before: float | None, after: float | None) -> float | None:
    """before / after, None where it has no meaning."""
    if before is None or after is None or not finite(before) or not finite(after):
        return None
    return before / after if before > 0 and after > 0 else None


def amount(factor: float | None, better: str, worse: str, same: str) -> tuple[str, str]:
    """A ratio as (`8.4×`, `smaller`); below one it is turned round and says `worse`."""
    if factor is None:
        return DASH, "not measured"
    word = better if factor > 1 else worse
    factor = max(factor, 1 / factor)
    if factor < 1.005:
        return "1×", same
    places = 2 if factor < 1.95 else 1 if factor < 99.95 else 0
    return (f"{factor:,.{places}f}×" if factor < 1e6 else f"{factor:.1e}×"), word


def phrase(words: tuple[str, str]) -> str:
    """The two words of `amount` in a sentence."""
    return words[1] if words[0] in (DASH, "1×") else " ".join(words)


def is_percent(result: Result) -> bool:
    """Whether the metric reads as a share: in 0 to 1, higher is better, no correlation."""
    name = result.metric.lower()
    known = [result.before.quality, result.after.quality, *(p.quality for p in result.front)]
    values = [v for v in known if v is not None and finite(v)]
    return (
        result.higher_is_better
        and not any(word in name for word in _NOT_PERCENT)
        and bool(values)
        and all(0 <= v <= 1 for v in values)
    )


def quality(value: float | None, percent: bool) -> str:
    """A value of the metric."""
    if value is None or not finite(value):
        return DASH
    return f"{value * 100:.2f}\u00a0%" if percent else number(value, 4 if abs(value) < 10 else 3)


def drop_amount(value: float | None, relative: bool, percent: bool, unit: bool = True) -> str:
    """A drop: percent of the original when relative, points of a share, or plain."""
    if value is None or not finite(value):
        return DASH
    if not relative and not percent:
        return number(value, 4 if abs(value) < 10 else 3)
    word = ("\u00a0%" if relative else "\u00a0points") if unit else ""
    return number(value * 100) + word


def ceiling(budget: Mapping[str, Any], name: str) -> float | None:
    """What was asked: a fraction (`drop`), bytes (`size`, `memory`) or milliseconds (`latency`).

    Numbers are bytes and seconds; `max_latency_ms` is milliseconds. None where nothing was asked.
    """
    for key, scale in ((f"max_{name}", 1.0), (f"max_{name}_bytes", 1.0), (f"max_{name}_ms", 1e-3)):
        value = budget.get(key)
        if not isinstance(value, int | float | str) or isinstance(value, bool):
            continue
        try:
            if name == "drop":
                found = units.parse_ratio(value)
            elif name == "latency":
                found = units.parse_time(value) * scale * 1e3
            else:
                found = float(units.parse_size(value))
        except UsageError:
            continue
        return found
    return None


def _joined(text: str) -> str:
    return text.replace(" ", "\u00a0")
