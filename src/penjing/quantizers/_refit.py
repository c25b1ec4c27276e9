"""Scales in closed form: least squares for codes that are already chosen.

Row by row, with basis vectors b[k, g] (what plane k stands for, zero outside group g):

    s = argmin of (w - sum s b) H (w - sum s b)^T = N^-1 r,  N = b H b^T,  r = b H w^T
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["affine", "solve"]

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


def affine(
    image: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero: Tensor,
    group: int,
    gram: Tensor,
    levels: int | None,
) -> tuple[Tensor, Tensor]:
    """Zero points, then scales, of least error for codes on an integer grid.

    The zero point is the best real one, rounded; the scales are the best ones for it. With
    b = codes - zero, b' = b - d (1 in the group, d what the zero point moved by), all that the
    second solution needs follows from the first one's products.

    Args:
        image: float32 W H [out, in].
        codes: uint8 [out, in].
        scale: those that are there [out, groups]; kept in a row whose result is no scale.
        zero: zero points [out, groups], whole numbers.
        group: columns that share a scale.
        gram: damped H [in, in].
        levels: the largest zero point; None to keep those that are there.

    Returns:
        Scales and zero points, float32 [out, groups].
    """
    inputs, groups = codes.shape[1], scale.shape[1]
    ones = _by_group(gram, group)  # H 1, [in, groups]
    between = _by_group(ones.T, group).double()  # 1 H 1, [groups, groups]
    scales, zeros = [], []
    count = max(1, min(_ROWS, _NUMBERS // (2 * groups) ** 2))
    for first in range(0, len(codes), count):
        rows = slice(first, first + count)
        base = codes[rows] - zero[rows].repeat_interleave(group, 1)[:, :inputs]
        own = torch.empty(len(base), groups, groups)  # b H b
        shared = torch.empty(len(base), groups, groups)  # b H 1
        for g in range(groups):
            first_column = g * group
            columns = slice(first_column, first_column + group)
            product = (base[:, columns] @ gram[columns, first_column:]).mul_(base[:, first_column:])
            own[:, g, g:] = own[:, g:, g] = _by_group(product, group)
            shared[:, g] = base[:, columns] @ ones[columns]
        own, shared = own.double(), shared.double()
        right, flat = (_by_group(x, group).double() for x in (base * image[rows], image[rows]))
        was, old = scale[rows].double(), zero[rows].double()
        moved = torch.zeros_like(old)
        if levels is not None:
            joint = torch.empty(len(base), groups, 2, groups, 2, dtype=torch.float64)
            joint[:, :, 0, :, 0], joint[:, :, 0, :, 1] = own, shared
            joint[:, :, 1, :, 0], joint[:, :, 1, :, 1] = shared.transpose(1, 2), between
            both = torch.stack([right, flat], -1).flatten(1)
            start_both = torch.stack([was, torch.zeros_like(was)], -1).flatten(1)
            found = _held(joint.reshape(len(base), 2 * groups, -1), both, start_both)
            size, shift = found.reshape(-1, groups, 2).unbind(-1)
            good = _good(size)
            size, shift = torch.where(good, size, was), torch.where(good, shift, 0.0)
            best = (old - shift / size.clamp_min(1e-30)).round().clamp(0, levels)
            moved = torch.where(size > 0, best - old, 0.0)
        # b' H b' and b' H W.
        crossed = moved.unsqueeze(1) * shared
        own = own - crossed - crossed.transpose(1, 2)
        own += moved.unsqueeze(2) * moved.unsqueeze(1) * between
        size = _held(own, right - moved * flat, was)
        scales.append(torch.where(_good(size) & (size > 0), size, was).float())
        zeros.append((old + moved).float())
    return torch.cat(scales), torch.cat(zeros)


def _by_group(x: Tensor, group: int) -> Tensor:
    """Sums over groups of the last axis, [..., in] to [..., groups]; the last may be shorter."""
    count = -(-x.shape[-1] // group)
    if pad := count * group - x.shape[-1]:
        x = torch.nn.functional.pad(x, (0, pad))
    return x.reshape(*x.shape[:-1], count, group).sum(-1)


def _good(scale: Tensor) -> Tensor:
    """Rows [out, 1] in which every scale is one."""
    return ((scale >= 0) & scale.isfinite()).all(1, keepdim=True)


def _solve(
    weight: Tensor, basis: Tensor, start: Tensor, group: int, gram: Tensor, positive: int
) -> Tensor:
    planes, out, _ = basis.shape
    groups = start.shape[2]
    if gram.ndim == 1 or groups == 1:
        image = basis * gram if gram.ndim == 1 else basis @ gram  # [planes, out, in]
        normal = _by_group(image.unsqueeze(1) * basis, group).permute(
            2, 3, 0, 1
        )  # [out, groups, p, p]
        right = _by_group(image * weight, group).permute(1, 2, 0)  # [out, groups, p]
        scale = _held(normal, right, start.permute(1, 2, 0)).permute(2, 0, 1)
    else:
        n = groups * planes
        whole = torch.empty(out, groups, planes, groups, planes)
        right = torch.empty(out, groups, planes)
        for g in range(groups):
            own = slice(g * group, (g + 1) * group)
            image = basis[..., own] @ gram[own]  # [planes, out, in]
            for q in range(planes):
                whole[:, g, :, :, q] = _by_group(image * basis[q], group).transpose(0, 1)
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
