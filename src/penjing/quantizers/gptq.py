"""GPTQ: round column by column, each rounding error repaired by the columns still to come.

Minimises tr((W - Q) H (W - Q)^T), H = X^T X / n, greedily (Frantar et al., arXiv 2210.17323).
With U upper and U^T U = (H + lambda I)^-1, for column j in turn:

    q_j = round(w_j);  e = (w_j - q_j) / U[j, j];  w_k -= e U[j, k]  for k > j

Columns go in descending order of H's diagonal (act-order) with static groups: the grids come
from the weights as they were, in their own order, so nothing is permuted at run time.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from penjing import grids, linalg
from penjing.errors import InputError
from penjing.planes import IntegerPlanes, Scheme

__all__ = ["families", "fit", "needs"]

needs = frozenset({"gram"})
families = frozenset({"integer"})


def fit(
    weight: Tensor,
    scheme: Scheme,
    stats: Any = None,
    *,
    act_order: bool = True,
    mse: bool = True,
    damping: float = 0.01,
    block: int = 128,
) -> IntegerPlanes:
    """Quantize with error feedback.

    Args:
        weight: [out, in].
        scheme: bits, group, symmetric.
        stats: its `gram` [in, in] is H. Without one H is the identity: every column alone,
            which is rounding to nearest on the grid.
        act_order: most important column first.
        mse: shrink each group's range to the least error weighted by H's diagonal; else min-max.
        damping: lambda as a fraction of the mean diagonal.
        block: columns whose updates are made together on the columns after them.

    Raises:
        InputError: not a matrix of finite floats, or a Gram matrix of another width.
    """
    weight = grids.check_weight(weight)
    out, inputs = weight.shape
    gram = getattr(stats, "gram", None)
    if gram is not None and tuple(gram.shape) != (inputs, inputs):
        raise InputError("Gram matrix", got=tuple(gram.shape), allowed=(inputs, inputs))
    diagonal = None if gram is None else _relative(gram.diagonal())
    grid = grids.mse(weight, scheme, diagonal) if mse else grids.min_max(weight, scheme)
    if gram is None or not weight.numel():
        return grids.to_planes(grid.codes(weight), grid)

    order = torch.arange(inputs)
    if act_order:
        order = gram.diagonal().argsort(descending=True, stable=True)
    upper = linalg.inverse_cholesky_upper(gram[order][:, order], damping).float()  # [in, in]
    # Transposed, so that a column of the weight is contiguous.
    rest = weight.T[order]  # [in, out]
    codes = torch.empty(inputs, out, dtype=torch.uint8)
    scales, zeros, shifts = (t.T.contiguous() for t in (grid.scale, grid.zero_point, grid.shift))
    places = (order // grid.group).tolist()
    for start in range(0, inputs, block):
        stop = min(start + block, inputs)
        errors = torch.empty(stop - start, out)
        for j in range(start, stop):
            scale, zero, shift = (t[places[j]] for t in (scales, zeros, shifts))  # [out]
            code = (rest[j] / scale).round_().add_(zero).clamp_(0, scheme.levels)
            codes[j] = code
            error = errors[j - start]
            torch.sub(rest[j], code.mul_(scale).add_(shift), out=error).div_(upper[j, j])
            rest[j + 1 : stop].addr_(upper[j, j + 1 : stop], error, alpha=-1)
        rest[stop:].addmm_(upper[start:stop, stop:].T, errors, alpha=-1)
    unordered = torch.empty_like(codes)
    unordered[order] = codes
    return grids.to_planes(unordered.T.contiguous(), grid)


def _relative(diagonal: Tensor) -> Tensor:
    """The diagonal over its mean, at least 1e-6: a dead input's range still counts a little."""
    mean = diagonal.mean()
    return (diagonal / mean if mean > 0 else torch.ones_like(diagonal)).clamp_min(1e-6).float()
