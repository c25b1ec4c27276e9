"""Wanda's mask in a few rounds, each with the least squares that the one before leaves room for.

A mask compares |w| |x| within each row (Wanda, Sun et al., arXiv 2306.11695); what stays is fitted
to the layer's output by a few conjugate gradient steps, and of the fitted weight more goes
(gradual pruning, Zhu and Gupta, arXiv 1710.01878). Few tokens say little of how two inputs go
together, so that H is drawn toward its diagonal (Ledoit and Wolf, 2004), by in / (in + tokens).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor

from penjing.linalg import masked_least_squares
from penjing.masks import Pattern

__all__ = ["fit", "portion"]

portion = 0.2
"""Of the calibration data what is looked at."""

# Of what goes in all, what has gone after each round but the last; steps of each and of the last.
_ROUNDS, _STEPS, _LAST = (0.3, 0.55, 0.75, 0.9), 2, 6


def fit(weight: Tensor, pattern: Pattern, stats: Any) -> tuple[Tensor, Tensor]:
    """The pruned weight float32 [out, in], and its mask, bool.

    Args:
        weight: [out, in], what the output should be near to.
        pattern: how many connections go.
        stats: `gram` [in, in], mean outer product of the inputs; `count` of them.
    """
    diagonal = stats.gram.diagonal()
    norm = diagonal.clamp_min(0).sqrt().float()
    drawn = len(diagonal) / (len(diagonal) + stats.count)
    gram = stats.gram * (1 - drawn)
    gram.diagonal().copy_(diagonal)
    made = weight.float()
    for share in _ROUNDS:
        stays = pattern.of - round(share * (pattern.of - pattern.kept))
        if pattern.of and stays == pattern.of:
            continue
        part = replace(pattern, sparsity=share * pattern.sparsity, kept=stays)
        mask = part.mask(made.abs() * norm, per_row=True)
        made = masked_least_squares(weight, gram, mask, made, _STEPS)
    mask = pattern.mask(made.abs() * norm, per_row=True)
    return masked_least_squares(weight, gram, mask, made, _LAST), mask
