"""Activation: score = mean |x| of a unit, as the layers that read it see it.

Where several layers read it, the sum of its shares of theirs. (Molchanov et al., arXiv 1611.06440)
"""

from __future__ import annotations

from torch import Tensor

from penjing.unitcriteria._view import View, shares

__all__ = ["needs", "score"]

needs = frozenset({"size"})


def score(view: View) -> Tensor:
    """[units]; larger means keep."""
    return shares(own.stats.size[own.columns].sum(1) for own in view.readings)
