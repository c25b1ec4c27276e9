"""Residual k-means: each codebook is learned on what the ones before it left.

codes = argmin over entries of sum over d of h_d * (x_d - c_d)^2,  c_d = sum h_d x_d / sum h_d
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["residual"]


def residual(
    points: Tensor, weights: Tensor, sizes: list[int], *, iterations: int = 10, seed: int = 0
) -> Tensor:
    """Codebooks whose sums come near the points.

    Args:
        points: float32 [n, dim].
        weights: [n, dim] of the squared errors, at least 0.
        sizes: bits of each codebook.
        iterations: of each codebook's k-means, from entries drawn among the points.
        seed: of that draw.

    Returns:
        float32 [codebooks, 2**max(sizes), dim]; rows that a size does not reach are zeros.
    """
    generator = torch.Generator().manual_seed(seed)
    tables = points.new_zeros(len(sizes), 2 ** max(sizes), points.shape[1])
    left = points.clone()
    for table, size in zip(tables, sizes, strict=True):
        chosen = torch.randperm(len(left), generator=generator)[: 2**size]
        own = table[: 2**size]
        own[: len(chosen)] = left[chosen]
        for _ in range(iterations):
            codes = _cheapest(left * weights, weights, own)
            total = torch.zeros_like(own).index_add_(0, codes, left * weights)
            mass = torch.zeros_like(own).index_add_(0, codes, weights)
            own.copy_(torch.where(mass > 0, total / mass.clamp_min(1e-30), own))
        left -= own[_cheapest(left * weights, weights, own)]
    return tables


def _cheapest(weighted: Tensor, weights: Tensor, table: Tensor) -> Tensor:
    return (weights @ table.square().T - 2 * weighted @ table.T).argmin(1)
