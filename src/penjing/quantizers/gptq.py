"""GPTQ: round column by column, each rounding error repaired by the columns still to come.

Minimises tr((W - Q) H (W - Q)^T), H = X^T X / n, greedily (Frantar et al., arXiv 2210.17323):
`_feedback.run` with the nearest point of each group's grid. Columns go in descending order of
H's diagonal (act-order) with static groups: the grids come from the weights as they were, in
their own order, so nothing is permuted at run time.

The grid was made for the weights, not for what feedback made of them. So `rounds` times more:

    refit     argmin over scales (and zero points, rounded) of the same loss, every row alone
    polish    coordinate descent over the codes

and what is best of all is kept.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from penjing import grids
from penjing.grids import Grid
from penjing.planes import IntegerPlanes, Scheme
from penjing.quantizers import _feedback
from penjing.quantizers._refit import affine

__all__ = ["families", "fit", "needs"]

needs = frozenset({"gram"})
families = frozenset({"integer"})

# From so many bits on the grid hardly matters.
_MANY = 6


def fit(
    weight: Tensor,
    scheme: Scheme,
    stats: Any = None,
    *,
    act_order: bool = True,
    mse: bool = True,
    damping: float = 0.01,
    block: int = 128,
    rounds: int = 4,
) -> IntegerPlanes:
    """Quantize with error feedback.

    Args:
        weight: [out, in].
        scheme: bits, group, symmetric, scale_bits.
        stats: its `gram` [in, in] is H. Without one H is the identity: every column alone,
            which is rounding to nearest on the grid.
        act_order: most important column first.
        mse: shrink each group's range to the least error weighted by H's diagonal; else min-max.
        damping: lambda as a fraction of the mean diagonal.
        block: columns whose updates are made together on the columns after them.
        rounds: refits and passes of coordinate descent after the feedback; none from 6 bits on.

    Raises:
        InputError: not a matrix of finite floats, or a Gram matrix of another width.
    """
    weight = grids.check_weight(weight)
    gram = _feedback.check_gram(weight, stats)
    diagonal = None if gram is None else _relative(gram.diagonal())
    grid = grids.mse(weight, scheme, diagonal) if mse else grids.min_max(weight, scheme)
    if gram is None or not weight.numel():
        return grids.to_planes(grid.codes(weight), grid)
    order = None if act_order else torch.arange(weight.shape[1])
    # A column at a time is written: each contiguous.
    codes = torch.empty(weight.shape[::-1], dtype=torch.uint8).T
    made = _feedback.run(
        weight, gram, _assigner(grid, codes, weight), order=order, damping=damping, block=block
    )
    if scheme.bits >= _MANY or not rounds:
        return grids.to_planes(codes, grid)
    smooth = _feedback.damped(gram, damping=damping)
    image = weight @ smooth  # [out, in]
    best, least = (codes, grid), _feedback.loss(weight - made, smooth)  # [out]
    for _ in range(rounds):
        scale, zero = affine(
            image, codes, grid.scale, grid.zero_point, grid.group, smooth,
            None if scheme.symmetric else scheme.levels,
        )  # fmt: skip
        grid = replace(grid, scale=scale, zero_point=zero)
        codes = codes.clone()
        made = grids.to_planes(codes, grid).dequantize()
        _, loss = _feedback.polish(
            weight, made, smooth, _assigner(grid, codes, weight), block=block
        )
        better = loss < least
        best, least = _rows(better, (codes, grid), best), torch.minimum(loss, least)
    return grids.to_planes(*best)


def _assigner(grid: Grid, codes: Tensor, weight: Tensor) -> _feedback.Assign:
    """Nearest point of the grid; writes the codes [out, in] of `weight` in place."""
    scales, zeros = grid.scale.T.contiguous(), grid.zero_point.T.contiguous()  # [groups, out]
    shifts = grid.shift.T.contiguous()
    top: Any = grid.scheme.levels
    low: Any = 0
    if grid.scheme.paired:
        low, top = (side.T.contiguous() for side in grids.limits(weight, grid))  # [in, out]

    def assign(columns: Tensor, place: int) -> Tensor:
        g = place // grid.group
        code = torch.addcdiv(zeros[g], columns[:, 0], scales[g]).round_()
        code = code.clamp_(low[place], top[place]) if grid.scheme.paired else code.clamp_(low, top)
        codes[:, place] = code
        return torch.addcmul(shifts[g], code, scales[g]).unsqueeze(1)

    return assign


def _rows(
    chosen: Tensor, new: tuple[Tensor, Grid], old: tuple[Tensor, Grid]
) -> tuple[Tensor, Grid]:
    """The new codes and grid where `chosen` [out], else the old."""
    pick = chosen.unsqueeze(1)
    scale = torch.where(pick, new[1].scale, old[1].scale)
    zero_point = torch.where(pick, new[1].zero_point, old[1].zero_point)
    grid = replace(new[1], scale=scale, zero_point=zero_point)
    return torch.where(pick, new[0], old[0]), grid


def _relative(diagonal: Tensor) -> Tensor:
    """The diagonal over its mean, at least 1e-6: a dead input's range still counts a little."""
    mean = diagonal.mean()
    return (diagonal / mean if mean > 0 else torch.ones_like(diagonal)).clamp_min(1e-6).float()
