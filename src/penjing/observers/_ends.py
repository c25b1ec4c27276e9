"""Search over both ends of a range, of whatever cost.

Both ends shrunk together first; then each end alone, over all factors of the whole range, so that
an outlier on one side does not cost the other side its end.
"""

from __future__ import annotations

from collections.abc import Callable

from penjing.histogram import Histogram

__all__ = ["Ends", "factors", "search", "whole_range"]

Ends = tuple[float, float]

_ROUNDS = 2


def factors(steps: int) -> list[float]:
    """1 down to 1 / steps evenly, then by powers of 10 ** (1 / 4) down to 1e-4 of that.

    The second part is for outliers that are many times as far out as everything else.
    """
    even = [1 - k / steps for k in range(steps)]
    return even + [10 ** (-k / 4) / steps for k in range(1, 17)]


def whole_range(histogram: Histogram) -> Ends:
    """Of all values, zero among them."""
    return min(histogram.low, 0.0), max(histogram.high, 0.0)


def search(histogram: Histogram, cost: Callable[[Ends], float], steps: int) -> Ends:
    """The range of least cost; of equals the widest.

    Args:
        histogram: of the values; without any, or of zeros alone, nothing is searched.
        cost: of a range.
        steps: as in `factors`.
    """
    whole = whole_range(histogram)
    if whole[0] == whole[1] or not bool(histogram.counts.any()):
        return whole
    known: dict[Ends, float] = {}

    def paid(ends: Ends) -> float:
        if ends not in known:
            known[ends] = cost(ends)
        return known[ends]

    tried = factors(steps)
    best = min(((whole[0] * f, whole[1] * f) for f in tried), key=paid)
    if 0 in whole:
        return best
    for _ in range(_ROUNDS):
        for side in (0, 1):
            others = [(whole[0] * f, best[1]) if side == 0 else (best[0], whole[1] * f)
                      for f in tried]  # fmt: skip
            best = min([best, *others], key=paid)
    return best
