"""L2: half the sum of the squares of all weights that the gates multiply; what got least goes.

    penalty = lambda / 2 sum of w^2,   prox: w <- w / (1 + t)

(weight decay: Hanson and Pratt, NIPS 1988.) It makes small and never zero, so the cut at the end
takes more away than with the other methods; it is there to compare with.
"""

from __future__ import annotations

from penjing.constraints._penalty import Penalty, ridge
from penjing.gating import Extent

__all__ = ["constraint"]


def constraint(extent: Extent, budget: float) -> Penalty:
    """Of weights of this extent."""
    return Penalty(ridge, extent.l2.square(), extent.l2)
