"""Wanda's mask, then the least squares that it leaves room for.

The mask compares |w| |x| within each row (Wanda, Sun et al., arXiv 2306.11695); what stays is
fitted to the layer's output by a few conjugate gradient steps, which need fewer samples than an
exact fit would.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from penjing.linalg import masked_least_squares
from penjing.masks import Pattern

__all__ = ["fit", "portion"]

portion = 0.2
"""Of the calibration data what is looked at."""


def fit(weight: Tensor, pattern: Pattern, stats: Any) -> tuple[Tensor, Tensor]:
    """The pruned weight float32 [out, in], and its mask, bool.

    Args:
        weight: [out, in], what the output should be near to.
        pattern: how many connections go.
        stats: `gram` [in, in], mean outer product of the inputs.
    """
    norm = stats.gram.diagonal().clamp_min(0).sqrt().float()
    mask = pattern.mask(weight.abs() * norm, per_row=True)
    return masked_least_squares(weight, stats.gram, mask, weight), mask
