"""Distillation's Kullback-Leibler divergence: T^2 * mean over rows of KL(p_t || p_s).

p = softmax(logits / T); T^2 keeps the gradient's size (Hinton et al., arXiv 1503.02531)
"""

from __future__ import annotations

from torch import Tensor

__all__ = ["loss"]


def loss(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """Scalar, in nats; both logits [..., classes]."""
    log_student = (student.float() / temperature).log_softmax(-1)
    log_teacher = (teacher.float() / temperature).log_softmax(-1)
    rows = (log_teacher.exp() * (log_teacher - log_student)).sum(-1)  # [...]
    return rows.mean() * temperature**2
