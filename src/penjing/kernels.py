"""Rounding of the kernels of grouped convolutions, each by the inputs that it sees.

Every group of a grouped convolution has inputs of its own, and of a depthwise one they are the k
x k places around a point, which are nearly equal: what counts is where the errors of a kernel add
up, not how large each is. So of every output o of group g

    argmin over codes of  e^T H_g e,   e = Q - W[o],   H_g = mean of the patches' x x^T

by coordinate descent: with all other errors fixed the best value of weight j is

    w_j - sum over k != j of H_jk e_k / H_jj

rounded to the grid (Behdin et al., QuantEase, arXiv 2309.01885, section 3; here all outputs at
once, each with its own H). It begins at round to nearest, for several scales up to the one that
clips nothing; each output keeps its best.
"""

from __future__ import annotations

import torch
from torch import Tensor

from penjing import grids
from penjing.errors import InputError
from penjing.grids import Grid
from penjing.planes import IntegerPlanes, Scheme

__all__ = ["fit"]

_SCALES, _LEAST = 16, 0.7
_DAMPING = 1e-3


def fit(weight: Tensor, scheme: Scheme, grams: Tensor, *, rounds: int = 10) -> IntegerPlanes:
    """Quantize kernels, one scale an output.

    Args:
        weight: [out, row], row = in / groups * h * w; the outputs of a group stand together.
        scheme: bits and symmetric; its group is the whole row.
        grams: H, [groups, row, row], float64.
        rounds: passes over the weights of a row, at the most.

    Returns:
        Planes; no output has more error than rounding to nearest on the grid that clips nothing.

    Raises:
        InputError: shapes that do not fit, NaN or infinite values.
    """
    weight = grids.check_weight(weight)
    out, row = weight.shape
    if grams.ndim != 3 or grams.shape[1:] != (row, row) or out % max(len(grams), 1):
        raise InputError(
            "Gram matrices of kernels", got=tuple(grams.shape), allowed=f"[groups, {row}, {row}]"
        )
    if not bool(torch.isfinite(grams).all()):
        raise InputError("Gram matrices of kernels have NaN or infinite values")
    level = grams.diagonal(dim1=1, dim2=2).mean(1).clamp_min(1e-30)  # [groups]
    metric = grams / level[:, None, None] + _DAMPING * torch.eye(row, dtype=torch.float64)
    metric = metric.float().repeat_interleave(out // len(grams), 0)  # [out, row, row]
    start = grids.min_max(weight, scheme)
    best, least = start, torch.full((out,), torch.inf)
    codes = torch.zeros(weight.shape)
    for step in range(_SCALES):
        share = 1 - (1 - _LEAST) * step / (_SCALES - 1)
        grid = Grid(start.scale * share, start.zero_point, scheme, start.group)
        found, loss = _descend(weight, grid, metric, rounds)
        better = (loss < least).unsqueeze(1)
        codes = torch.where(better, found, codes)
        scale = torch.where(better, grid.scale, best.scale)
        best = Grid(scale, start.zero_point, scheme, start.group)
        least = torch.minimum(loss, least)
    return grids.to_planes(codes.to(torch.uint8), best)


def _descend(weight: Tensor, grid: Grid, metric: Tensor, rounds: int) -> tuple[Tensor, Tensor]:
    """Codes [out, row] as floats, and the loss of each output [out]."""
    scale, zero = grid.scale, grid.zero_point  # [out, 1]
    codes = grid.codes(weight).float()
    error = (codes - zero) * scale - weight
    for _ in range(rounds):
        before = codes.clone()
        for j in range(weight.shape[1]):
            own = metric[:, j, j]
            pull = (metric[:, j] * error).sum(1) - own * error[:, j]
            target = weight[:, j] - pull / own
            code = ((target / scale[:, 0]).round() + zero[:, 0]).clamp(0, grid.scheme.levels)
            codes[:, j] = code
            error[:, j] = (code - zero[:, 0]) * scale[:, 0] - weight[:, j]
        if torch.equal(codes, before):
            break
    return codes, torch.einsum("oi,oij,oj->o", error, metric, error)
