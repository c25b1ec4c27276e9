"""Taylor: score = mean over samples of |e|, e the loss's first-order change without a unit.

    e = sum over the layers that read it, and its columns there, of weight * slope

e is the slope at the unit's gate (Molchanov et al., CVPR 2019, arXiv 1906.10771), sample by sample.
"""

from __future__ import annotations

import torch
from torch import Tensor

from penjing.unitcriteria._view import View

__all__ = ["absolute", "needs", "score"]

needs = frozenset({"gradient"})
absolute = True


def score(view: View) -> Tensor:
    """[units], in units of the loss; larger means keep."""
    return torch.stack([own.effects() for own in view.readings]).sum(0).abs().mean(0)
