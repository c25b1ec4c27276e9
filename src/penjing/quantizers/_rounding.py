"""What the leaves share that learn a rounding by gradient: the loss e H e^T of every row."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from penjing.errors import InputError
from penjing.quantizers import _feedback

__all__ = ["ROWS", "loss", "metrics", "wide"]

# Rows learnt at once; they do not depend on each other.
ROWS = 1024


def metrics(weight: Tensor, stats: Any, damping: float) -> tuple[Tensor, Tensor] | None:
    """H to learn by, damped, and H to judge by, float32 [in, in], both over its mean diagonal.

    Without a Gram matrix, None: then rounding to nearest is the best there is.

    Raises:
        InputError: a Gram matrix of another width, or with NaN or infinite values.
    """
    gram = _feedback.check_gram(weight, stats)
    if gram is None or not weight.numel():
        return None
    if not bool(torch.isfinite(gram).all()):
        raise InputError("a Gram matrix has NaN or infinite values", next="check the data")
    return _feedback.damped(gram, damping=damping), _feedback.damped(gram, damping=0.0)


def loss(error: Tensor, gram: Tensor) -> Tensor:
    """e H e^T of each row, [out]."""
    return ((error @ gram) * error).sum(1)


def wide(per_group: Tensor, group: int, inputs: int) -> Tensor:
    """[out, groups] as [out, in]."""
    return per_group.repeat_interleave(group, dim=1)[:, :inputs]
