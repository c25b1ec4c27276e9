"""The range of the least mean squared error: rounding inside against clipping outside.

    argmin over (low, high) of  sum_b count_b * (x_b - grid(x_b))^2

x_b are the centres of the bins; ends are factors of the whole range, see `_ends`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from penjing.histogram import Histogram
from penjing.observers import _ends

__all__ = ["fit"]


def fit(histogram: Histogram, bits: int = 8, *, steps: int = 40) -> tuple[float, float]:
    """Lowest and highest value of the grid; zero lies between them.

    Args:
        histogram: of the values.
        bits: of the grid.
        steps: even factors tried, 1 down to 1 / steps.
    """
    seen = histogram.counts > 0
    values, counts = histogram.centres[seen], histogram.counts[seen].double()
    return _ends.search(histogram, lambda ends: _error(values, counts, ends, bits), steps)


def _error(values: Tensor, counts: Tensor, ends: tuple[float, float], bits: int) -> float:
    levels = 2**bits - 1
    scale = (ends[1] - ends[0]) / levels
    if scale <= 0:
        return float("inf")
    zero = round(-ends[0] / scale)
    codes = (torch.round(values / scale) + zero).clamp(0, levels)
    return float((counts * (values - (codes - zero) * scale).square()).sum())
