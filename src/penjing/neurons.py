"""Which neurons to keep: greedy optimal brain surgeon on the consumer's Gram matrix.

Removing inputs g of a consumer W with Gram matrix H, and refitting the rest, costs
    trace(W_g ([H^-1]_gg)^-1 W_g^T)
(Hassibi and Stork 1993, for groups: ZipLM, Kurtic et al., NeurIPS 2023, section 3). The
cheapest group goes, W and H^-1 are updated, and so on; the updated W is the least-squares
refit. Single neurons go a thirtieth at a time.
"""

from __future__ import annotations

import torch
from torch import Tensor

from penjing.linalg import damped_cholesky

__all__ = ["by_scores", "greedy_obs"]


def greedy_obs(
    weight: Tensor, gram: Tensor, units: list[list[int]], keep: int, damping: float = 0.01
) -> tuple[list[int], Tensor]:
    """Remove units one by one until `keep` are left.

    Args:
        weight: [out, in] of the consumer.
        gram: [in, in] of its inputs.
        units: inputs of each unit; all of one length.
        keep: units that stay, at least 1.

    Returns:
        Kept unit numbers, ascending, and the refitted weight [out, kept inputs].
    """
    lower = damped_cholesky(gram.double(), damping)
    inverse = torch.cholesky_inverse(lower)  # [in, in]
    updated = weight.double().clone()
    index = torch.tensor(units)  # [units, size]
    alive = torch.ones(len(units), dtype=torch.bool)
    size = index.shape[1]
    # Single inputs go some at a time: the order inside 3 % hardly matters, the time does.
    stride = max(1, len(units) // 32) if size == 1 else 1
    while int(alive.sum()) > keep:
        left = alive.nonzero().flatten()
        if size == 1:
            columns = index[left, 0]
            cost = updated[:, columns].square().sum(0) / inverse[columns, columns]
        else:
            blocks = inverse[index[left].unsqueeze(-1), index[left].unsqueeze(-2)]
            part = updated[:, index[left]].permute(1, 2, 0)  # [left, size, out]
            cost = (part * torch.linalg.solve(blocks, part)).sum((1, 2))
        count = min(stride, int(alive.sum()) - keep)
        chosen = left[torch.sort(cost, stable=True).indices[:count]]
        gone = index[chosen].flatten()
        step = torch.linalg.solve(inverse[gone][:, gone], inverse[gone])  # [gone, in]
        updated -= updated[:, gone] @ step
        inverse -= inverse[:, gone] @ step
        # Exact zeros: rounding must not bring a removed input back.
        updated[:, gone] = 0
        inverse[gone], inverse[:, gone] = 0.0, 0.0
        inverse[gone, gone] = 1.0
        alive[chosen] = False
    kept = alive.nonzero().flatten().tolist()
    inputs = sorted(i for u in kept for i in units[u])
    return kept, updated[:, inputs].float()


def by_scores(scores: Tensor, units: list[list[int]], keep: int) -> list[int]:
    """The `keep` units with the largest sum of squared scores [out, in], ascending."""
    total = torch.stack([scores[:, u].float().square().sum() for u in units])
    order = torch.sort(total, descending=True, stable=True).indices
    return sorted(order[:keep].tolist())
