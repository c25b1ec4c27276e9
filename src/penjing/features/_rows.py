"""Hidden states without what is padding."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["pooled", "unexplained"]


def unexplained(student: Tensor, teacher: Tensor, mask: Tensor | None) -> Tensor:
    """Mean squared error over the teacher's variance, scalar; all [batch, places, width]."""
    s, t = (
        x.float().flatten(0, 1) if mask is None else x.float()[mask] for x in (student, teacher)
    )
    spread = (t - t.mean(0)).square().mean()
    return (s - t).square().mean() / spread.clamp_min(torch.finfo(torch.float32).tiny)


def pooled(hidden: Tensor, mask: Tensor | None) -> Tensor:
    """[batch, places, width] to float32 [batch, width], the mean of the places."""
    own = hidden.float()
    if mask is None:
        return own.mean(1)
    kept = mask.unsqueeze(-1).float()  # [batch, places, 1]
    return (own * kept).sum(1) / kept.sum(1).clamp_min(1)
