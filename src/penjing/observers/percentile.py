"""The range without a share of the values at each end: (1 - quantile) below, the same above."""

from __future__ import annotations

import torch

from penjing.errors import UsageError
from penjing.histogram import Histogram
from penjing.observers import _ends

__all__ = ["fit"]


def fit(histogram: Histogram, bits: int = 8, *, quantile: float = 0.9999) -> tuple[float, float]:
    """Lowest and highest value of the grid; zero lies between them.

    Args:
        histogram: of the values.
        bits: of the grid; not used.
        quantile: share of the values below the high end, and above the low one.

    Raises:
        UsageError: a quantile that leaves no range.
    """
    if not 0.5 < quantile <= 1:
        raise UsageError("quantile", got=quantile, allowed="above 0.5, at most 1")
    sums = histogram.counts.cumsum(0)  # [bins]
    total = int(sums[-1])
    if not total:
        return _ends.whole_range(histogram)
    # The first bin by whose end more than the tail has been passed; linear within the bin.
    tail = (1 - quantile) * total
    last = int(torch.searchsorted(sums.double(), total - tail))
    first = int(torch.searchsorted(sums.double(), tail, right=True))
    edges = (histogram.centres - histogram.width / 2).tolist()
    own = histogram.counts.tolist()
    before = sums - histogram.counts
    high = edges[last] + histogram.width * (total - tail - int(before[last])) / own[last]
    low = edges[first] + histogram.width * (tail - int(before[first])) / own[first]
    return min(max(low, histogram.low), 0.0), max(min(high, histogram.high), 0.0)
