"""The range whose grid keeps most of the distribution: least Kullback-Leibler divergence.

    argmin over ranges of  KL(P || Q)

P is the histogram with everything outside the range added to its end bins; Q is the histogram
inside the range, averaged over the bins of each grid step that P has anything in (Migacz, 8-bit
Inference with TensorRT, GTC 2017; here each end is searched, see `_ends`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from penjing.histogram import Histogram
from penjing.observers import _ends

__all__ = ["divergence", "fit"]

# What Q has at least where P has something, as a share: P's clipped values may fall on a step
# that holds nothing else.
_LEAST = 1e-12


def fit(histogram: Histogram, bits: int = 8, *, steps: int = 40) -> tuple[float, float]:
    """Lowest and highest value of the grid; zero lies between them.

    Args:
        histogram: of the values.
        bits: of the grid.
        steps: even factors of the whole range tried, 1 down to 1 / steps.
    """
    return _ends.search(histogram, lambda ends: divergence(histogram, ends, bits), steps)


def divergence(histogram: Histogram, ends: tuple[float, float], bits: int) -> float:
    """KL(P || Q) in nats of the grid over `ends`.

    Infinite where no value is inside, and where there are fewer bins than steps: P and Q of one
    bin are always equal.
    """
    p, q = _distributions(histogram, ends, bits)
    if len(q) < 2**bits or not float(q.sum()):
        return float("inf")
    p, q = p / p.sum(), (q / q.sum()).clamp_min(_LEAST)
    some = p > 0
    return float((p[some] * (p[some] / q[some]).log()).sum())


def _distributions(
    histogram: Histogram, ends: tuple[float, float], bits: int
) -> tuple[Tensor, Tensor]:
    """P and Q over the bins of the range, the two that its ends lie in among them, as counts."""
    centres, counts = histogram.centres, histogram.counts.double()
    scale = (ends[1] - ends[0]) / (2**bits - 1)
    half = histogram.width / 2
    first = int((centres + half <= ends[0]).sum())
    last = int((centres - half <= ends[1]).sum()) - 1
    if scale <= 0 or last < first:
        return counts, torch.zeros_like(counts)
    own = counts[first : last + 1]
    clipped = own.clone()  # [bins]
    clipped[0] += counts[:first].sum()
    clipped[-1] += counts[last + 1 :].sum()
    step = ((centres[first : last + 1] - ends[0]) / scale).round().clamp(0, 2**bits - 1).long()
    held = (clipped > 0).double()
    sums = torch.zeros(2, 2**bits, dtype=torch.float64).index_add_(
        1, step, torch.stack([own, held])
    )
    return clipped, held * (sums[0] / sums[1].clamp_min(1))[step]
