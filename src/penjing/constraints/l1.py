"""L1: the sum of the sizes of all weights that the gates multiply, by proximal gradient descent.

    penalty = lambda sum of |w|,   prox: w <- sign(w) max(0, |w| - t)

(Tibshirani, JRSS B 1996; proximal: Daubechies et al., CPAM 2004.) A gate g scales its weights, w =
g w0, so its penalty is lambda |g| sum of |w0|. Of single weights the group lasso is the same; of
units it counts many small weights for more.
"""

from __future__ import annotations

from penjing.constraints._penalty import Penalty, soft_threshold
from penjing.gating import Extent

__all__ = ["constraint"]


def constraint(extent: Extent, budget: float) -> Penalty:
    """Of weights of this extent."""
    return Penalty(soft_threshold, extent.l1, extent.l2)
