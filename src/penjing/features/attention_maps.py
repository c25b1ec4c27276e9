"""Where tokens look: KL(softmax a_t || softmax a_s) of the rows of attention.

The distributions themselves, as the softmax of an attention makes them (MiniLM, Wang et al., arXiv
2002.10957, section 3.1): head by head, or where there are other numbers of heads the mean of them.
"""

from __future__ import annotations

import math

from torch import Tensor

__all__ = ["loss", "of"]

of = "maps"


def loss(student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
    """Scalar, in nats: mean over places and heads.

    Args:
        student: scores before the softmax [batch, places, heads, places looked at], or
            [batch, places, places looked at] of a single head.
        teacher: likewise, with any number of heads.
        mask: bool [batch, places], False for padding; places looked at have theirs in the scores.
    """
    alike = student.shape == teacher.shape
    s, t = (_log_rows(x, mask, alike) for x in (student, teacher))  # [n, heads, places]
    return (t.exp() * (t - s)).sum(-1).mean()


def _log_rows(scores: Tensor, mask: Tensor | None, alike: bool) -> Tensor:
    own = scores.float() if mask is None else scores.float()[mask]
    own = own.log_softmax(-1)
    return own if alike else own.logsumexp(-2, keepdim=True) - math.log(own.shape[-2])
