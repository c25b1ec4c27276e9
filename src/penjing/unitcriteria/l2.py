"""L2: score = the squared norm of the weights that make a unit.

Where several layers make it, the sum of its shares of theirs. (Li et al., arXiv 1608.08710, who
prefer L1 and find the same)
"""

from __future__ import annotations

from torch import Tensor

from penjing.unitcriteria._view import View, shares

__all__ = ["needs", "score"]

needs: frozenset[str] = frozenset()


def score(view: View) -> Tensor:
    """[units]; larger means keep."""
    return shares(rows.double().square().sum(1) for rows in view.made)
