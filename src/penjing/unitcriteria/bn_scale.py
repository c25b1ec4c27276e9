"""Batch norm scale: score = |gain| of the batch norm on a unit (Network Slimming, Liu et al., ICCV
2017, arXiv 1708.06519, section 3); of several the mean.

Gains are compared over the whole network as they are, as in the paper.
"""

from __future__ import annotations

import torch
from torch import Tensor

from penjing.unitcriteria._view import View

__all__ = ["absolute", "needs", "score"]

needs = frozenset({"gain"})
absolute = True


def score(view: View) -> Tensor:
    """[units]; larger means keep. There is a batch norm."""
    return torch.stack([gain.double().abs().mean(1) for gain in view.gains]).mean(0)
