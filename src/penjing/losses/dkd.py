"""Decoupled distillation: T^2 * mean over rows of a KL(b_t || b_s) + c KL(q_t || q_s).

b = (p of the target class, the rest) and q = the other classes among themselves. In plain KL the
second term has the weight 1 - p_t: the surer the teacher, the less it says of the other classes
(Zhao et al., CVPR 2022, section 3.2).
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["loss"]


def loss(
    student: Tensor, teacher: Tensor, temperature: float = 4.0, labels: Tensor | None = None,
    target: float = 1.0, others: float = 8.0,
) -> Tensor:  # fmt: skip
    """Scalar, in nats; both logits [..., classes].

    Args:
        labels: int64 [...], the target classes; without them the teacher's likeliest.
        target, others: weights a and c of the two terms.
    """
    chosen = teacher.argmax(-1) if labels is None else labels
    index = chosen.unsqueeze(-1)  # [..., 1]
    (sure_s, rest_s), (sure_t, rest_t) = (
        _parts(logits.float() / temperature, index) for logits in (student, teacher)
    )
    first = (sure_t.exp() * (sure_t - sure_s)).sum(-1)
    second = (rest_t.exp() * (rest_t - rest_s)).sum(-1)
    return (target * first + others * second).mean() * temperature**2


def _parts(logits: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities of target and rest [..., 2], and of the others alone [..., classes - 1]."""
    own = logits.gather(-1, index)  # [..., 1]
    there = torch.ones_like(logits, dtype=torch.bool).scatter(-1, index, False)
    others = logits[there].view(*logits.shape[:-1], -1)
    pair = torch.cat((own, others.logsumexp(-1, keepdim=True)), -1)
    return pair.log_softmax(-1), others.log_softmax(-1)
