"""The range of the least mean squared error: rounding inside against clipping outside.

    argmin over factors f of  sum_b count_b * (x_b - grid_f(x_b))^2,   range = f * (low, high)

x_b are the centres of the bins; the low end is shrunk with the high one, and each end alone.
"""

from __future__ import annotations

import torch
from torch import Tensor

from penjing.histogram import Histogram

__all__ = ["fit"]


def fit(histogram: Histogram, bits: int = 8, *, steps: int = 40) -> tuple[float, float]:
    """Lowest and highest value of the grid; zero lies between them.

    Args:
        histogram: of the values.
        bits: of the grid.
        steps: factors tried, 1 down to 1 / steps.
    """
    low, high = min(histogram.low, 0.0), max(histogram.high, 0.0)
    if low == high:
        return low, high
    seen = histogram.counts > 0
    values, counts = histogram.centres[seen], histogram.counts[seen].double()
    factors = [1 - k / steps for k in range(steps)]
    low, high = min(
        ((low * f, high * f) for f in factors),
        key=lambda ends: _error(values, counts, ends, bits),
    )
    for _ in range(2):  # each end alone, the other one held
        for ends in ([(low * f, high) for f in factors], [(low, high * f) for f in factors]):
            low, high = min([(low, high), *ends], key=lambda e: _error(values, counts, e, bits))
    return low, high


def _error(values: Tensor, counts: Tensor, ends: tuple[float, float], bits: int) -> float:
    levels = 2**bits - 1
    scale = (ends[1] - ends[0]) / levels
    if scale <= 0:
        return float("inf")
    zero = round(-ends[0] / scale)
    codes = (torch.round(values / scale) + zero).clamp(0, levels)
    return float((counts * (values - (codes - zero) * scale).square()).sum())
