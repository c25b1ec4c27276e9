"""Relational distillation: distances of pairs and angles of triplets of samples, Huber loss.

    distance   |x_i - x_j| / mean over pairs
    angle      cosine of the angle at x_j between x_i and x_k

L = distance + 2 angle (Park et al., arXiv 1904.05068, section 3.2); a sample is the mean of its
places.
"""

from __future__ import annotations

import torch
from torch import Tensor

from penjing.features._rows import pooled

__all__ = ["loss"]

_ANGLE = 2.0


def loss(student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
    """Scalar.

    Args:
        student: [batch, places, width].
        teacher: [batch, places, any width].
        mask: bool [batch, places], False for padding.
    """
    near = torch.nn.functional.smooth_l1_loss
    s, t = pooled(student, mask), pooled(teacher, mask)
    return near(_distances(s), _distances(t)) + _ANGLE * near(_angles(s), _angles(t))


def _distances(x: Tensor) -> Tensor:
    """[pairs], each pair once."""
    first, second = torch.triu_indices(len(x), len(x), 1, device=x.device)
    # The root has no slope at 0, where two samples are the same.
    found = ((x[first] - x[second]).square().sum(-1) + 1e-12).sqrt()
    return found / found.mean()


def _angles(x: Tensor) -> Tensor:
    """[batch, batch, batch]: cosines at the first sample."""
    sides = x.unsqueeze(0) - x.unsqueeze(1)  # [corner, other, width]
    unit = sides / (sides.square().sum(-1, keepdim=True) + 1e-12).sqrt()
    return unit @ unit.transpose(1, 2)
