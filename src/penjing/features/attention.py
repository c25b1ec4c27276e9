"""Attention transfer: |a_s / |a_s| - a_t / |a_t||^2, a = mean square of a place's channels.

Where a network is active, of any width (Zagoruyko and Komodakis, arXiv 1612.03928, section 3.1).
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["loss"]


def loss(student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
    """Scalar: mean over samples.

    Args:
        student: [batch, places, width].
        teacher: [batch, places, any width].
        mask: bool [batch, places], False for padding.
    """
    maps = []
    for hidden in (student, teacher):
        own = hidden.float().square().mean(-1)  # [batch, places]
        maps.append(own if mask is None else own * mask)
    s, t = (torch.nn.functional.normalize(own, dim=-1) for own in maps)
    return (s - t).square().sum(-1).mean()
