"""Jensen-Shannon divergence: T^2 * mean over rows of KL(p_t || m) / 2 + KL(p_s || m) / 2.

m = (p_t + p_s) / 2 and p = softmax(z / T); between the two directions of KL (GKD, Agarwal et al.,
arXiv 2306.13649, section 2).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["loss"]


def loss(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """Scalar, in nats; both logits [..., classes]. At most T^2 log 2."""
    log_student = (student.float() / temperature).log_softmax(-1)
    log_teacher = (teacher.float() / temperature).log_softmax(-1)
    middle = torch.logaddexp(log_teacher, log_student) - math.log(2)
    near = (log_teacher.exp() * (log_teacher - middle)).sum(-1)  # [...]
    far = (log_student.exp() * (log_student - middle)).sum(-1)
    return (near + far).mean() / 2 * temperature**2
