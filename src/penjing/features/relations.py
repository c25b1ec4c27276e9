"""Self-attention relations: KL of softmax(X X^T / sqrt(d)), X in relation heads of width d.

The relations of a network's tokens to each other, of its queries, its keys and its values, have
one shape whatever the widths and numbers of heads (MiniLMv2, Wang et al., arXiv 2012.15828,
section 3.1).
"""

from __future__ import annotations

import math

from torch import Tensor

__all__ = ["loss", "of"]

of = "attention"

_HEADS = 12


def loss(student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
    """Scalar, in nats: mean over samples, relation heads and places.

    Args:
        student: [batch, places, width], e.g. queries of all heads side by side.
        teacher: [batch, places, any width].
        mask: bool [batch, places], False for padding.
    """
    heads = math.gcd(student.shape[-1], teacher.shape[-1])
    heads = max(n for n in range(1, _HEADS + 1) if heads % n == 0)
    logs, logt = (_relations(x, heads, mask) for x in (student, teacher))
    found = (logt.exp() * (logt - logs)).sum(-1)  # [batch, heads, places]
    if mask is None:
        return found.mean()
    return found.transpose(1, 2)[mask].mean()


def _relations(x: Tensor, heads: int, mask: Tensor | None) -> Tensor:
    """Log-probabilities [batch, heads, places, places]."""
    own = x.float().reshape(*x.shape[:-1], heads, -1).transpose(1, 2)  # [batch, heads, places, d]
    scores = own @ own.transpose(2, 3) / math.sqrt(own.shape[-1])
    if mask is not None:
        # Not infinite: 0 times that would be no number.
        scores = scores.masked_fill(~mask[:, None, None, :], -1e4)
    return scores.log_softmax(-1)
