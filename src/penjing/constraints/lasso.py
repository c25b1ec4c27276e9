"""Group lasso: the sum of the norms of what the gates multiply, by proximal gradient descent.

    penalty = lambda sum over groups of |W|_2,   prox: W <- W max(0, 1 - t / |W|_2)

(Yuan and Lin, JRSS B 2006; of networks: Wen et al., arXiv 1608.03665.) A gate g scales its group,
W = g W0, so its penalty is lambda |W0|_2 |g|, and the operator in g the soft threshold by t |W0|_2.
"""

from __future__ import annotations

from penjing.constraints._penalty import Penalty, soft_threshold
from penjing.gating import Extent

__all__ = ["constraint"]


def constraint(extent: Extent, budget: float) -> Penalty:
    """Of weights of this extent."""
    return Penalty(soft_threshold, extent.l2, extent.l2)
