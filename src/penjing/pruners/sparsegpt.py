"""SparseGPT: columns from the first to the last, what a removal costs is made up for by later ones.

With U the upper Cholesky factor of (H + lambda I)^-1, a connection w_ij costs w_ij^2 / U_jj^2; in
each block of 128 columns the cheapest go, and W_i,j+1.. -= (w_ij / U_jj) U_j,j+1.. (Frantar and
Alistarh, arXiv 2301.00774, algorithm 1).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from penjing.linalg import inverse_cholesky_upper
from penjing.masks import Pattern

__all__ = ["fit"]

_BLOCK = 128


def fit(weight: Tensor, pattern: Pattern, stats: Any) -> tuple[Tensor, Tensor]:
    """The pruned weight float32 [out, in], and its mask, bool.

    Args:
        weight: [out, in], what the output should be near to.
        pattern: how many connections go.
        stats: `gram` [in, in], mean outer product of the inputs.
    """
    upper = inverse_cholesky_upper(stats.gram).float()
    weight = weight.float().clone()
    mask = torch.ones_like(weight, dtype=torch.bool)
    # A block of columns holds whole groups of a pattern.
    size = max(1, _BLOCK // pattern.width) * pattern.width
    for first in range(0, weight.shape[1], size):
        last = min(first + size, weight.shape[1])
        if not pattern.of:
            cost = weight[:, first:last] / upper.diagonal()[first:last]
            mask[:, first:last] = pattern.mask(cost.square())
        for column in range(first, last):
            if pattern.of and (column - first) % pattern.of == 0:
                group = slice(column, min(column + pattern.of, last))
                mask[:, group] = pattern.mask((weight[:, group] / upper.diagonal()[group]).abs())
            gone = torch.where(mask[:, column], 0.0, weight[:, column] / upper[column, column])
            weight[:, column:] -= torch.outer(gone, upper[column, column:])
    return weight * mask, mask
