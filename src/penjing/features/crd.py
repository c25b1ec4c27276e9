"""Contrastive: which of a batch's samples a state is of, told by the teacher's states.

    mean over i of -log(exp(s_i t_i / tau) / sum over j of exp(s_i t_j / tau)), both ways

of unit vectors; the student's are projected first. The negatives are those of the batch, where
the paper has a memory of all samples (CRD, Tian et al., arXiv 1910.10699, section 3.1; in this
form InfoNCE, van den Oord et al., arXiv 1807.03748).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from penjing.features._rows import pooled

__all__ = ["loss", "projection"]

projection = "learned"

_TAU = 0.1


def loss(student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
    """Scalar, in nats; log batch for a student that knows nothing.

    Args:
        student: [batch, places, width], projected.
        teacher: of the same shape.
        mask: bool [batch, places], False for padding.
    """
    s, t = (functional.normalize(pooled(x, mask), dim=-1) for x in (student, teacher))
    scores = s @ t.T / _TAU  # [batch, batch]
    own = torch.arange(len(scores), device=scores.device)
    return (functional.cross_entropy(scores, own) + functional.cross_entropy(scores.T, own)) / 2
