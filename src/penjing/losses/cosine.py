"""Cosine distance: mean over rows of 1 - <s, t> / (|s| |t|)."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["loss"]


def loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Scalar; both [..., width]. A row of zeros counts as a distance of 1."""
    return (
        1 - torch.nn.functional.cosine_similarity(student.float(), teacher.float(), dim=-1).mean()
    )
