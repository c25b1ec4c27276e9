"""Fisher: score = w^2 * mean over samples of g^2 / 2, g the slope of a sample's loss by w.

To second order what the loss rises by when w is set to zero: its Hessian is the Fisher
information, of which only the diagonal counts (LeCun et al., Optimal Brain Damage, 1990; Theis et
al., arXiv 1801.05787)
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from penjing.criteria._gradient import gradient_of

__all__ = ["absolute", "needs", "score"]

absolute = True
needs = frozenset({"gradient"})


def score(weight: Tensor, stats: Any = None) -> Tensor:
    """weight^2 * square / 2, [out, in]; larger means keep.

    Args:
        weight: [out, in].
        stats: its `gradient` (`penjing.layerstats.Gradient`).

    Raises:
        InputError: there is none.
    """
    square: Tensor = gradient_of(stats, "fisher").square
    return weight.detach().square() * square.to(weight) / 2
