"""Reverse Kullback-Leibler divergence: T^2 * mean over rows of KL(p_s || p_t), p = softmax(z / T).

It seeks the teacher's modes: a small student gives up rare classes, not the likely ones (MiniLLM,
Gu et al., arXiv 2306.08543, section 2.1).
"""

from __future__ import annotations

from torch import Tensor

__all__ = ["loss"]


def loss(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """Scalar, in nats; both logits [..., classes]."""
    log_student = (student.float() / temperature).log_softmax(-1)
    log_teacher = (teacher.float() / temperature).log_softmax(-1)
    rows = (log_student.exp() * (log_student - log_teacher)).sum(-1)  # [...]
    return rows.mean() * temperature**2
