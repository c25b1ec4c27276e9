"""Growing regularization: an L2 penalty that grows on all, then on what is to go alone.

    prox: w <- w / (1 + t),   t growing

While it grows on all, what the loss holds on to shrinks less; then what shrank most, as many as the
budget asks, is pressed to nothing while the others are free to make up for it (Wang et al., ICLR
2021, arXiv 2012.09243: their GReg-2, then GReg-1).
"""

from __future__ import annotations

import torch
from torch import Tensor

from penjing.constraints._penalty import Penalty, ridge
from penjing.gating import Extent

__all__ = ["constraint"]

# Share of the way on which all are penalised.
_ALL = 0.3


def constraint(extent: Extent, budget: float) -> Penalty:
    """Of weights of this extent, of which a fraction `budget` goes."""

    def chosen(score: Tensor, done: float) -> Tensor:
        if done < _ALL:
            return torch.ones_like(score, dtype=torch.bool)
        least = max(1, round(budget * len(score)))
        return score <= score.kthvalue(least).values

    ones = torch.ones_like(extent.l2)
    return Penalty(ridge, ones, ones, chosen)
