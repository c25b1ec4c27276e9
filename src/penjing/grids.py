"""Integer grids: scale and zero point of each group of a weight, and rounding to them.

    code = clip(round(w / scale) + zero_point, 0, 2**bits - 1)        round half to even
    min-max grid:  scale = (hi - lo) / (2**bits - 1), zero_point = round(-lo / scale)
    MSE grid:      min-max scale * s, the s in (0, 1] of least sum of importance * error^2

lo <= 0 <= hi, so a weight of zero stays zero. A symmetric grid has zero_point 2**(bits - 1)
and the least scale that clips nothing.

Paired grids are for processors that add two products of an unsigned and a signed byte in 16 bits
(see `penjing.processor`): 255 (a + b) fits into 16 bits for all codes a and b about the zero point
with |a + b| <= 128, so of 8-bit codes only the sums of neighbours are bounded, and few large
weights have a large neighbour of their own sign. In seven bits every code is, to half of that.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from penjing.errors import InputError
from penjing.planes import IntegerPlanes, Scheme, round_scales

__all__ = [
    "Grid", "check_weight", "grouped", "limits", "min_max", "mse", "room", "search", "spread",
    "to_planes",
]  # fmt: skip

_TINY = torch.finfo(torch.float32).tiny
# Largest sum of a pair of codes: 255 * 128 < 2**15.
_PAIR = 128
# Rows searched at once: bounds the memory of a search on vocabularies.
_ROWS = 2048


@dataclass(frozen=True, eq=False)
class Grid:
    """Scales and zero points, both float32 [out, groups]; the zero points are whole numbers."""

    scale: Tensor
    zero_point: Tensor
    scheme: Scheme
    group: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "scale", round_scales(self.scale, self.scheme.scale_bits))

    @property
    def shift(self) -> Tensor:
        """[out, groups]: -scale * zero_point."""
        return -self.scale * self.zero_point

    def codes(self, weight: Tensor) -> Tensor:
        """Nearest codes, uint8 [out, in]."""
        parts = grouped(weight, self.group)
        codes = _round(parts, self.scale.unsqueeze(-1), self.zero_point.unsqueeze(-1), self.scheme)
        return codes.flatten(1)[:, : weight.shape[1]].to(torch.uint8)


def check_weight(weight: Tensor) -> Tensor:
    """`weight` [out, in] as float32.

    Raises:
        InputError: not a matrix, not floats, or with NaN or infinite values.
    """
    if weight.ndim != 2 or not weight.is_floating_point():
        raise InputError(
            "a weight to quantize", got=f"{weight.dtype} {tuple(weight.shape)}", allowed="[out, in]"
        )
    weight = weight.detach().float()
    if not bool(torch.isfinite(weight).all()):
        raise InputError("a weight to quantize has NaN or infinite values")
    return weight


def grouped(weight: Tensor, group: int) -> Tensor:
    """[out, in] as [out, groups, group], the last group filled up with zeros."""
    # Zeros are on every grid, so padding changes neither a range nor an error.
    padded = torch.nn.functional.pad(weight, (0, -weight.shape[1] % group))
    return padded.reshape(len(weight), padded.shape[1] // group, group)


def spread(per_group: Tensor, group: int, inputs: int) -> Tensor:
    """[out, groups] as [out, inputs], each repeated over its group."""
    return per_group.repeat_interleave(group, dim=1)[:, :inputs]


def _round(weight: Tensor, scale: Tensor, zero_point: Tensor, scheme: Scheme) -> Tensor:
    codes = (weight / scale).round_().add_(zero_point).clamp_(0, scheme.levels)
    return _together(codes - zero_point).add_(zero_point) if scheme.paired else codes


def _together(codes: Tensor) -> Tensor:
    """Codes about the zero point [..., in], both of a pair moved by half of what is too much."""
    width = codes.shape[-1]
    codes = torch.nn.functional.pad(codes, (0, width % 2))
    total = codes[..., ::2] + codes[..., 1::2]
    surplus = total - total.clamp(-_PAIR, _PAIR)
    first = (surplus / 2).trunc()
    codes = codes - torch.stack([first, surplus - first], -1).flatten(-2)
    return codes[..., :width]


def limits(weight: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """Lowest and highest code of each weight, [out, in]; every choice within them is allowed."""
    top = torch.full_like(weight, grid.scheme.levels)
    if not grid.scheme.paired:
        return torch.zeros_like(top), top
    zero = spread(grid.zero_point, grid.group, weight.shape[1])
    own = grid.codes(weight) - zero
    down, up = room(own)
    return (own - down + zero).clamp(min=0), torch.minimum(own + up + zero, top)


def room(codes: Tensor) -> tuple[Tensor, Tensor]:
    """How far the codes of a paired grid may go down, and up; every choice keeps the sums.

    Each of two neighbours may go half of what the pair has left.

    Args:
        codes: about the zero point, [out, in]; a pair of them whose sum is too large has less
            than nothing.
    """
    width = codes.shape[1]
    codes = torch.nn.functional.pad(codes, (0, width % 2))
    total = codes[:, ::2] + codes[:, 1::2]
    down, up = (
        ((_PAIR - side * total) / 2).floor().repeat_interleave(2, 1)[:, :width] for side in (-1, 1)
    )
    return down, up


def min_max(weight: Tensor, scheme: Scheme) -> Grid:
    """The grid that just covers each group.

    Args:
        weight: [out, in] float32; the last group may be shorter.
        scheme: bits, group, symmetric.
    """
    group = scheme.group_of(weight.shape[1])
    parts = grouped(weight, group)
    if not parts.shape[1]:
        empty = weight.new_ones(len(weight), 0)
        return Grid(empty, empty.clone(), scheme, group)
    low = parts.amin(-1).clamp_max(0.0)  # [out, groups]
    high = parts.amax(-1).clamp_min(0.0)
    half = 2 ** (scheme.bits - 1)
    if scheme.symmetric:
        scale = torch.maximum(high / (half - 1), -low / half)
        if scheme.paired:
            even = torch.nn.functional.pad(parts, (0, parts.shape[-1] % 2)) / 2
            means = (even[..., ::2] + even[..., 1::2]).abs()
            scale = torch.maximum(scale, means.amax(-1) / (_PAIR / 2))
    else:
        scale = high / scheme.levels - low / scheme.levels
    # A group of zeros, or of numbers too small to divide by. In 8 bits a large scale would take
    # the precision of its neighbours.
    live = scale >= _TINY
    dead = scale[live].min() if scheme.scale_bits == 8 and bool(live.any()) else 1.0
    scale = torch.where(live, scale, dead)
    if scheme.symmetric:
        zero_point = torch.full_like(scale, half)
    else:
        zero_point = (-low / scale).round().clamp(0, scheme.levels)
    return Grid(scale, zero_point, scheme, group)


def search(
    weight: Tensor, start: Grid, find: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
) -> tuple[Tensor, Tensor]:
    """Better scales and zero points [out, groups], some rows at a time.

    Args:
        weight: float32 [out, in].
        start: where the search begins.
        find: (weights [rows, groups, group], scale, zero point) to scale and zero point, all
            [rows, groups]; rows do not depend on each other.
    """
    if not start.scale.numel():
        return start.scale, start.zero_point
    found = []
    for first in range(0, len(weight), _ROWS):
        rows = slice(first, first + _ROWS)
        parts = grouped(weight[rows], start.group)
        found.append(find(parts, start.scale[rows], start.zero_point[rows]))
    scale, zero_point = (torch.cat(parts) for parts in zip(*found, strict=True))
    return scale, zero_point


def mse(weight: Tensor, scheme: Scheme, importance: Tensor | None = None, steps: int = 40) -> Grid:
    """The min-max grid shrunk, group by group, to the least weighted squared error.

    Args:
        weight: [out, in] float32.
        scheme: bits, group, symmetric.
        importance: [in], weights of the squared errors, e.g. the diagonal of the Gram matrix.
        steps: factors tried: 1, 1 - 0.8 / steps, ... above 0.2. The largest of equals wins.
    """
    whole = min_max(weight, scheme)
    factors = 1.0 - 0.8 * torch.arange(steps) / steps
    weights = None
    if importance is not None:
        weights = grouped(importance.float().unsqueeze(0), whole.group)  # [1, groups, group]

    def find(parts: Tensor, base: Tensor, zero_point: Tensor) -> tuple[Tensor, Tensor]:
        middle = zero_point.unsqueeze(-1)
        best, least = base, torch.full_like(base, torch.inf)
        for factor in factors.tolist():
            scale = base * factor
            wide = scale.unsqueeze(-1)
            codes = _round(parts, wide, middle, scheme)
            error = codes.sub_(middle).mul_(wide).sub_(parts).square_()
            total = (error if weights is None else error.mul_(weights)).sum(-1)
            better = (total < least) & (scale >= _TINY)
            best, least = torch.where(better, scale, best), torch.where(better, total, least)
        return best, zero_point

    scale, zero_point = search(weight, whole, find)
    return Grid(scale, zero_point, scheme, whole.group)


def to_planes(codes: Tensor, grid: Grid) -> IntegerPlanes:
    """One plane of `codes` uint8 [out, in] on `grid`."""
    scheme = grid.scheme
    half = (float(2 ** (scheme.bits - 1)),)
    return IntegerPlanes(
        codes.unsqueeze(0),
        (scheme.bits,),
        grid.scale.unsqueeze(0),
        grid.shift,
        grid.group,
        scale_bits=scheme.scale_bits,
        offset="centre" if scheme.symmetric else "zero",
        centre=half if scheme.symmetric else (),
    )
