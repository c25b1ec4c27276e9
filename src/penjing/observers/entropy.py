"""The range whose grid keeps most of the distribution: least Kullback-Leibler divergence.

    argmin over ranges of  KL(P || Q)

P is the histogram with everything outside the range added to its end bins; Q is the histogram
inside the range, averaged over the bins of each grid step that hold anything (Migacz, 8-bit
Inference with TensorRT, GTC 2017; here with a low end of its own).
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
        steps: factors of the whole range tried, 1 down to 1 / steps.
    """
    low, high = min(histogram.low, 0.0), max(histogram.high, 0.0)
    if low == high:
        return low, high
    ends = ((low * (1 - k / steps), high * (1 - k / steps)) for k in range(steps))
    return min(ends, key=lambda e: divergence(histogram, e, bits))


def divergence(histogram: Histogram, ends: tuple[float, float], bits: int) -> float:
    """KL(P || Q) in nats of the grid over `ends`; infinite where no value is inside."""
    centres, counts = histogram.centres, histogram.counts.double()
    inside = (centres >= ends[0]) & (centres <= ends[1])
    # A value on the end of the range may have its bin's centre outside.
    if not bool(inside.any()) or not float(counts[inside].sum()):
        return float("inf")
    own = counts[inside]  # [bins]
    clipped = own.clone()
    clipped[0] += counts[centres < ends[0]].sum()
    clipped[-1] += counts[centres > ends[1]].sum()
    scale = (ends[1] - ends[0]) / (2**bits - 1)
    step = ((centres[inside] - ends[0]) / scale).round().long()
    spread = _spread(own, step)
    p, q = clipped / clipped.sum(), spread / spread.sum()
    some = p > 0
    # Clipped values may fall on an empty end bin, which Q does not know.
    return float((p[some] * (p[some] / q[some].clamp_min(1e-12)).log()).sum())


def _spread(counts: Tensor, step: Tensor) -> Tensor:
    """Counts averaged over the bins of each step that hold anything."""
    held = (counts > 0).double()
    size = int(step.max()) + 1
    total = torch.zeros(size, dtype=torch.float64).index_add_(0, step, counts)
    bins = torch.zeros(size, dtype=torch.float64).index_add_(0, step, held)
    return held * (total / bins.clamp_min(1))[step]
