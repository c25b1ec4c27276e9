"""Fisher: score = mean over samples of e^2 / 2, e the loss's first-order change without a unit.

To second order the rise of the loss: the Fisher information of the unit's gate (Theis et al., arXiv
1801.05787). e is summed over all layers that read the unit before it is squared.
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
    return torch.stack([own.effects() for own in view.readings]).sum(0).square().mean(0) / 2
