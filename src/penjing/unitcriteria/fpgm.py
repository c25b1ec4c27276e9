"""FPGM: score = sum over the other units of the distance of the weights that make them.

The unit nearest to the geometric median of all is the one that the others can replace (He et al.,
CVPR 2019, arXiv 1811.00250). Where several layers make it, the sum of its shares of
theirs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from penjing.unitcriteria._view import View, shares

__all__ = ["needs", "score"]

needs: frozenset[str] = frozenset()


def score(view: View) -> Tensor:
    """[units]; larger means keep."""
    return shares(torch.cdist(rows.double(), rows.double()).sum(1) for rows in view.made)
