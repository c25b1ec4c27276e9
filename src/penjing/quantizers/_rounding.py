"""What the leaves share that learn a rounding by gradient."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from penjing.quantizers import _feedback

__all__ = ["ROWS", "metrics"]

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
    return _feedback.damped(gram, damping=damping), _feedback.damped(gram, damping=0.0)
