"""HQQ: half-quadratic quantization, no data: grids that few large errors do not draw.

    argmin over z of  sum |w - s (q - z)|^p,  q = clip(round(w / s + z)),  p = 0.7

split by half-quadratics (Badri & Shaji, 2023), in turn and with beta growing:

    e = shrink(w - s (q - z)) = sign(r) max(|r| - |r|^(p - 1) / beta, 0),   r the error
    z = mean over the group of (q - (w - e) / s)

Errors are measured in units of the scale, so that beta means the same for every layer. A zero
point that must be whole never leaves the one of min-max that way: such a grid, and a symmetric
one, gets its scale instead,

    s = sum of (q - z) (w - e) / sum of (q - z)^2
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from penjing import grids
from penjing.errors import UsageError
from penjing.grids import Grid
from penjing.planes import IntegerPlanes, Scheme, round_scales

__all__ = ["families", "fit", "needs"]

needs: frozenset[str] = frozenset()
families = frozenset({"integer"})

_TINY = torch.finfo(torch.float32).tiny


def fit(
    weight: Tensor,
    scheme: Scheme,
    stats: Any = None,
    *,
    p: float = 0.7,
    beta: float = 10.0,
    growth: float = 1.01,
    rounds: int = 20,
    whole: bool = True,
) -> IntegerPlanes:
    """Fit each group's zero point or scale.

    Args:
        weight: [out, in].
        scheme: bits, group, symmetric, scale_bits.
        stats: not used.
        p: power of the error, above 0, at most 1.
        beta: of the first round; larger is nearer to plain averaging.
        growth: of beta from round to round.
        rounds: at most; a group keeps its best.
        whole: keep whole zero points, which every runtime has, and fit scales; otherwise
            zero points are fitted, and the offset is stored as a scale is.

    Raises:
        InputError: not a matrix of finite floats.
        UsageError: a power outside its range.
    """
    if not 0 < p <= 1:
        raise UsageError("power of the error", got=p, allowed="above 0, at most 1")
    weight = grids.check_weight(weight)
    start = grids.min_max(weight, scheme)
    held = whole or scheme.symmetric
    if not start.scale.numel():
        return grids.to_planes(start.codes(weight), start)
    real = grids.grouped(torch.ones(1, weight.shape[1]), start.group)[0]  # [groups, group]
    scale, zero = grids.search(
        weight,
        start,
        lambda parts, base, middle: _alternate(
            parts, real, base, middle, scheme, p, beta, growth, rounds, held
        ),
    )
    if held:
        grid = Grid(scale, zero, scheme, start.group)
        return grids.to_planes(grid.codes(weight), grid)
    scale = round_scales(scale, scheme.scale_bits)
    shift = round_scales(-scale * zero, scheme.scale_bits, signed=True)
    parts = grids.grouped(weight, start.group)
    codes = ((parts - shift.unsqueeze(-1)) / scale.unsqueeze(-1)).round().clamp(0, scheme.levels)
    return IntegerPlanes(
        codes.flatten(1)[None, :, : weight.shape[1]].to(torch.uint8).contiguous(),
        (scheme.bits,), scale.unsqueeze(0), shift, start.group, scale_bits=scheme.scale_bits,
    )  # fmt: skip


def _alternate(
    grouped: Tensor,
    real: Tensor,
    base: Tensor,
    zero: Tensor,
    scheme: Scheme,
    p: float,
    beta: float,
    growth: float,
    rounds: int,
    held: bool,
) -> tuple[Tensor, Tensor]:
    """Scales and zero points [out, groups] for weights [out, groups, group]."""
    unit = grouped / base.unsqueeze(-1)
    size = real.sum(-1)
    scale = torch.ones_like(base)
    kept, least = (scale, zero), torch.full_like(base, torch.inf)
    for _ in range(rounds):
        wide, at = scale.unsqueeze(-1), zero.unsqueeze(-1)
        codes = (unit / wide).add_(at).round_().clamp_(0, scheme.levels)
        centred = codes - at
        error = unit - centred * wide
        total = (error.abs().pow(p) * real).sum(-1)
        better = total < least
        kept = (torch.where(better, scale, kept[0]), torch.where(better, zero, kept[1]))
        least = torch.where(better, total, least)
        distance = error.abs() / wide
        large = (distance - distance.clamp_min(_TINY).pow(p - 1) / beta).clamp_min_(0) * wide
        near = unit - torch.copysign(large, error)
        if held:
            square = (centred.square() * real).sum(-1)
            new = (centred * near * real).sum(-1) / square.clamp_min(_TINY)
            scale = torch.where((square > 0) & (new * base >= _TINY), new, scale)
        else:
            zero = ((codes - near) * real).sum(-1) / size
        beta *= growth
    return kept[0] * base, kept[1]
