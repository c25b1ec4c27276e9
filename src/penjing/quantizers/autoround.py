"""SignRound: rounding offsets and ranges by the signs of their gradients (arXiv 2309.05516).

    argmin over V, a, b of  tr(E H E^T),   E = s (clip(round(w / s + V) + z) - z) - W
    s = (a hi - b lo) / (2^bits - 1),  z = round(-b lo / s),   |V| <= 1/2

(Cheng et al.; AutoRound is its program.) In each round V, a and b move by the rate against the
sign of their gradients, roundings taken as straight through; the rate goes down to 0 and every
row keeps its best. (lo, hi) is each group's range of least error, a and b are 1/2 to 3/2: the
paper begins at min-max, with a and b at most 1. The whole data is in H: no batches, no chance.

Slower than `gptq` and worse: no weight moves by more than a step, and correlated inputs want more.
On three layers of a sentence encoder (groups of 64; 4, 3, 2 bits) it left 1.5 to 2.2 times the
error of `gptq` on the data it learnt from and 1.2 to 1.6 times on other data, in 6 to 10 times
the time.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from penjing import grids
from penjing.grids import Grid
from penjing.planes import IntegerPlanes, Scheme
from penjing.quantizers import _feedback, _rounding

__all__ = ["families", "fit", "needs"]

needs = frozenset({"gram"})
families = frozenset({"integer"})

_SPAN = (0.5, 1.5)


def fit(
    weight: Tensor,
    scheme: Scheme,
    stats: Any = None,
    *,
    rounds: int = 200,
    rate: float = 0.0,
    damping: float = 0.01,
) -> IntegerPlanes:
    """Learn offsets and ranges.

    Args:
        weight: [out, in].
        scheme: bits, group, symmetric (one factor for both ends), scale_bits.
        stats: its `gram` [in, in] is H; without one this is round to nearest.
        rounds: of descent.
        rate: first step of every number; 0 is 1 / rounds.
        damping: added to H while learning, over its mean diagonal.

    Returns:
        Planes; the error is not above that of round to nearest on the grid it begins with.

    Raises:
        InputError: not a matrix of finite floats, or a Gram matrix of another width or with NaN.
    """
    weight = grids.check_weight(weight)
    metrics = _rounding.metrics(weight, stats, damping)
    grid = grids.mse(weight, scheme, None if metrics is None else metrics[0].diagonal())
    start = grids.to_planes(grid.codes(weight), grid)
    if metrics is None:
        return start
    found = []
    fine = replace(scheme, scale_bits=32)
    for first in range(0, len(weight), _rounding.ROWS):
        rows = slice(first, first + _rounding.ROWS)
        own = Grid(grid.scale[rows], grid.zero_point[rows], fine, grid.group)
        found.append(_learn(weight[rows], own, metrics[0], rounds, rate or 1 / max(rounds, 1)))
    codes, scale, zero = (torch.cat(parts) for parts in zip(*found, strict=True))
    # Rounded: straight-through sums are whole numbers only nearly.
    planes = grids.to_planes(
        codes.round().to(torch.uint8), Grid(scale, zero.round(), scheme, grid.group)
    )
    was, now = (_feedback.loss(p.dequantize() - weight, metrics[1]).sum() for p in (start, planes))
    return planes if now < was else start


def _straight(x: Tensor) -> Tensor:
    """Rounded, with the gradient of x."""
    return x + (x.round() - x).detach()


def _learn(weight: Tensor, grid: Grid, gram: Tensor, rounds: int, rate: float) -> list[Tensor]:
    """Codes [rows, in], scales and zero points [rows, groups]."""
    base, middle, top = grid.scale, grid.zero_point, grid.scheme.levels
    unit = 1 / base.mean(1, keepdim=True)
    # Factors of the ends less 1.
    learnt = [torch.zeros_like(t).requires_grad_() for t in (weight, base, base)]
    limits = [(-0.5, 0.5)] + [(_SPAN[0] - 1, _SPAN[1] - 1)] * 2
    best = [torch.zeros_like(weight), base, middle]
    least = torch.full_like(base[:, 0], torch.inf)
    for turn in range(rounds + 1):
        offset, low, high = learnt
        if grid.scheme.symmetric:
            scale, zero = base * (1 + high), middle
        else:
            below, above = middle * (1 + low), (top - middle) * (1 + high)
            ratio = (below + above) / top
            scale, zero = base * ratio, _straight(below / ratio).clamp(0, top)
        size, place = (grids.spread(t, grid.group, weight.shape[1]) for t in (scale, zero))
        codes = (_straight(weight / size + offset) + place).clamp(0, top)
        error = ((codes - place) * size - weight) * unit
        with torch.no_grad():
            pull = error @ gram  # half of the slope: the product is needed once
            total = (pull * error).sum(1)  # [rows]
            better = (total < least).unsqueeze(1)
            new = zip((codes, scale, zero), best, strict=True)
            best = [torch.where(better, now, was) for now, was in new]
            least = torch.minimum(total, least)
        if turn == rounds:
            break
        slopes = torch.autograd.grad((pull * error).sum(), learnt, materialize_grads=True)
        with torch.no_grad():
            for value, slope, ends in zip(learnt, slopes, limits, strict=True):
                value.sub_(slope.sign(), alpha=rate * (1 - turn / rounds)).clamp_(*ends)
    return best
