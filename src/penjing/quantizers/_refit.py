"""Scales in closed form: least squares for codes that are already chosen.

Row by row, with basis vectors b[k, g] (what plane k stands for, zero outside group g):

    s = argmin of (w - sum s b) H (w - sum s b)^T = N^-1 r,  N = b H b^T,  r = b H w^T
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["solve"]

# Rows, and numbers of their normal equations, that are in memory at once.
_ROWS, _NUMBERS = 512, 2**25


def solve(
    weight: Tensor,
    basis: Callable[[slice], Tensor],
    start: Tensor,
    group: int,
    gram: Tensor,
    positive: int,
) -> Tensor:
    """The scales of least error.

    Args:
        weight: float32 [out, in].
        basis: gives b of a slice of rows, float32 [planes, rows, in].
        start: scales that are there [planes, out, groups]; a plane that does not matter keeps
            its own, and so does a row (with a diagonal: a group) whose result is no scale.
        group: columns that share a scale.
        gram: damped H [in, in], or a diagonal [in] to take columns as independent.
        positive: the first planes that must not get a negative scale.

    Returns:
        float32 [planes, out, groups].
    """
    parts = []
    count = max(1, min(_ROWS, _NUMBERS // max(start.shape[0] * start.shape[2], 1) ** 2))
    for first in range(0, len(weight), count):
        rows = slice(first, first + count)
        parts.append(_solve(weight[rows], basis(rows), start[:, rows], group, gram, positive))
    return torch.cat(parts, 1) if parts else start


def _solve(
    weight: Tensor, basis: Tensor, start: Tensor, group: int, gram: Tensor, positive: int
) -> Tensor:
    planes, out, inputs = basis.shape
    groups = start.shape[2]
    pad = groups * group - inputs

    def by_group(x: Tensor) -> Tensor:  # [..., in] to sums [..., groups]
        return torch.nn.functional.pad(x, (0, pad)).reshape(*x.shape[:-1], groups, group).sum(-1)

    if gram.ndim == 1 or groups == 1:
        image = basis * gram if gram.ndim == 1 else basis @ gram  # [planes, out, in]
        normal = by_group(image.unsqueeze(1) * basis).permute(2, 3, 0, 1)  # [out, groups, p, p]
        right = by_group(image * weight).permute(1, 2, 0)  # [out, groups, p]
        scale = _held(normal, right, start.permute(1, 2, 0)).permute(2, 0, 1)
    else:
        n = groups * planes
        whole = torch.empty(out, groups, planes, groups, planes)
        right = torch.empty(out, groups, planes)
        for g in range(groups):
            own = slice(g * group, (g + 1) * group)
            image = basis[..., own] @ gram[own]  # [planes, out, in]
            for q in range(planes):
                whole[:, g, :, :, q] = by_group(image * basis[q]).transpose(0, 1)
            right[:, g] = (image * weight).sum(-1).T
        flat = start.permute(1, 2, 0).reshape(out, n)
        solved = _held(whole.reshape(out, n, n), right.reshape(out, n), flat)
        scale = solved.reshape(out, groups, planes).permute(2, 0, 1)
    good = (scale[:positive] >= 0).all(0) & scale.isfinite().all(0)  # [out, groups]
    if gram.ndim == 2:
        good = good.all(1, keepdim=True)
    return torch.where(good, scale.float(), start).contiguous()


def _held(normal: Tensor, right: Tensor, start: Tensor) -> Tensor:
    # Held a little to what is there: a plane may be constant, a group of no importance.
    normal, right, start = normal.double(), right.double(), start.double()
    diagonal = normal.diagonal(dim1=-2, dim2=-1)
    held = 1e-6 * diagonal + 1e-9 * diagonal.amax(-1, keepdim=True) + 1e-30
    normal = normal + torch.diag_embed(held)
    solved: Tensor = torch.linalg.solve(normal, right + held * start)
    return solved
