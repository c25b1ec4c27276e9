"""Skew Kullback-Leibler divergence: T^2 * mean over rows of KL(p_t || a p_t + (1 - a) p_s).

The teacher's share `a` in the mixture bounds the gradient where the student has next to no
probability (DistiLLM, Ko et al., arXiv 2402.03898, section 3.1).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["loss"]


def loss(student: Tensor, teacher: Tensor, temperature: float = 1.0, skew: float = 0.1) -> Tensor:
    """Scalar, in nats; both logits [..., classes].

    Args:
        skew: a, 0 < a < 1.
    """
    log_student = (student.float() / temperature).log_softmax(-1)
    log_teacher = (teacher.float() / temperature).log_softmax(-1)
    mixed = torch.logaddexp(log_teacher + math.log(skew), log_student + math.log1p(-skew))
    rows = (log_teacher.exp() * (log_teacher - mixed)).sum(-1)  # [...]
    return rows.mean() * temperature**2
