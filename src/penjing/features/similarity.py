"""Similarity-preserving: |G_s - G_t|^2 / batch^2, G = Q Q^T with rows of unit length.

Q has a sample's whole state in a row: samples that are alike to the teacher are to be alike to the
student, whatever their widths (Tung and Mori, arXiv 1907.09682, section 3).
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["loss"]


def loss(student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
    """Scalar.

    Args:
        student: [batch, places, width].
        teacher: [batch, places, any width].
        mask: bool [batch, places], False for padding.
    """
    grams = []
    for hidden in (student, teacher):
        own = hidden.float()
        own = (own if mask is None else own * mask.unsqueeze(-1)).flatten(1)
        grams.append(torch.nn.functional.normalize(own @ own.T, dim=1))  # [batch, batch]
    return (grams[0] - grams[1]).square().mean()
