"""The grid of least weighted squared error: scales and zero points searched, then least squares.

    argmin over scale, zero point of  sum over the group of h (w - scale (q - zero))^2

with q the nearest codes. Low and high end move apart from each other: every zero point near the
min-max one is searched with every scale below it; the best goes on by least squares in turn with
rounding.
"""

from __future__ import annotations

import torch
from torch import Tensor

from penjing import grids
from penjing.grids import Grid
from penjing.planes import Scheme

__all__ = ["search"]

_TINY = torch.finfo(torch.float32).tiny
_ROUNDS = 4


def search(
    weight: Tensor,
    scheme: Scheme,
    importance: Tensor | None = None,
    steps: int = 20,
    reach: int = 3,
) -> Grid:
    """The grid of least weighted squared error.

    Args:
        weight: float32 [out, in].
        scheme: bits, group, symmetric, scale_bits.
        importance: [in], at least 0; inputs of no importance still count a little.
        steps: scales tried for a zero point, 1 to 0.2 of the min-max one.
        reach: zero points tried on either side of the min-max one.
    """
    whole = grids.min_max(weight, scheme)
    if not whole.scale.numel():
        return whole
    if importance is None:
        importance = torch.ones(weight.shape[1])
    mean = importance.double().mean()
    weights = (importance.double() / mean if mean > 0 else torch.ones_like(importance)).float()
    # Padding has no weight at all, so that it does not draw the scale.
    heavy = grids.grouped(weights.clamp_min(1e-6).unsqueeze(0), whole.group)[0]
    scale, zero = grids.search(
        weight,
        whole,
        lambda parts, base, middle: _search(parts, heavy, base, middle, scheme, steps, reach),
    )
    return Grid(scale, zero, scheme, whole.group)


def _search(
    grouped: Tensor,
    heavy: Tensor,
    base: Tensor,
    middle: Tensor,
    scheme: Scheme,
    steps: int,
    reach: int,
) -> tuple[Tensor, Tensor]:
    """Scales and zero points [out, groups] for weights [out, groups, group]."""
    # In units of the min-max scale, where squares neither overflow nor vanish.
    unit = grouped / base.unsqueeze(-1)

    def codes(scale: Tensor, zero: Tensor) -> Tensor:  # about the zero point
        zero = zero.unsqueeze(-1)
        rounded = (unit / scale.unsqueeze(-1)).round_()
        return torch.minimum(torch.maximum(rounded, -zero), scheme.levels - zero)

    def cost(centred: Tensor, scale: Tensor) -> Tensor:
        off = (centred * scale.unsqueeze(-1)).sub_(unit).square_()
        total: Tensor = off.mul_(heavy).sum(-1)
        return total

    scale, zero = torch.ones_like(base), middle
    least = cost(codes(scale, zero), scale)

    def keep(new: Tensor, place: Tensor) -> None:
        nonlocal scale, zero, least
        total = cost(codes(new, place), new)
        better = (total < least) & (new * base >= _TINY)
        scale, zero = torch.where(better, new, scale), torch.where(better, place, zero)
        least = torch.where(better, total, least)

    for step in range(-reach, reach + 1) if not scheme.symmetric else (0,):
        place = (middle + step).clamp(0, scheme.levels)
        for factor in torch.linspace(1.0, 0.2, steps).tolist():
            keep(torch.full_like(base, factor), place)
    for _ in range(_ROUNDS):
        centred = codes(scale, zero)
        square = (centred.square() * heavy).sum(-1)
        best = (centred * unit * heavy).sum(-1) / square.clamp_min(_TINY)
        keep(torch.where(square > 0, best, scale), zero)
    return scale * base, zero
