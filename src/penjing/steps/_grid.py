"""Quantized weights that gradient descent can move: their scales, and where asked their codes.

    w = sum over k of s_k * z_k + shift,  s = s_0 * (1 + a),  shift = shift_0 + s_0 * b

a and b are trained, in units of the scale; a shift that is stored as a zero point, or not at all,
follows the scale. With learned codes of one integer plane (learned step size quantization, Esser
et al., arXiv 1902.08153) a float v stands behind every code:

    code = round(clip(v, 0, 2**bits - 1))

with slope 1 for the rounding. Where the sums of neighbouring 8-bit codes fit the processors that
they were made for (see `penjing.grids`), v stays where they do. v is in units of the scale, so
that the two do not pull each other.
Of rotated planes all this is in their basis; the weight that comes out is not.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from penjing.grids import room
from penjing.model import Model, parent_of
from penjing.planes import IntegerPlanes, round_scales
from penjing.scales import centred

__all__ = ["Grid", "attach"]

# A scale keeps at least this much of what it was, and so its sign.
_LEAST = 0.05
# How far behind its code a float may begin, in codes: at 0.5 all would turn at the first step.
_KEPT = 0.3


class Grid(nn.Module):
    """A parametrization of a weight by its planes.

    Args:
        planes: where training starts.
        behind: the float weight [out, in] whose codes are learned, or None to hold the codes;
            only with one plane of integers. It is moved to near its code where it has another.
    """

    whole: Tensor  # [planes, out, groups, group]
    scale: Tensor
    shift: Tensor
    zero: Tensor  # used where the shift is stored as a zero point
    low: Tensor  # of learned codes [out, groups, group]
    high: Tensor

    def __init__(self, planes: IntegerPlanes, behind: Tensor | None = None) -> None:
        super().__init__()
        self.planes = planes
        count, out, groups = planes.scale.shape
        pad = groups * planes.group - planes.inputs
        if planes.is_integer:
            codes = planes.codes
        else:
            codes = torch.stack([planes.integers(k) for k in range(count)])
        wide = nn.functional.pad(codes.float(), (0, pad))
        self.register_buffer("whole", wide.reshape(count, out, groups, planes.group))
        self.register_buffer("scale", planes.scale)
        self.register_buffer("shift", planes.shift)
        if planes.offset == "zero":
            self.register_buffer("zero", planes.zero_point)
        self.a = nn.Parameter(torch.zeros_like(planes.scale))
        self.b = nn.Parameter(torch.zeros_like(planes.shift)) if planes.offset == "float" else None
        self.v: nn.Parameter | None = None
        if behind is not None:
            if planes.basis is not None:
                behind = planes.basis.apply(behind.float())
            value = nn.functional.pad(behind.float().reshape(out, -1), (0, pad))
            place = value.reshape(out, groups, -1) - self._wide(self.shift)
            place = place / self._wide(self.scale[0]).clamp_min(1e-30)
            code = self.whole[0]
            self.v = nn.Parameter(torch.minimum(torch.maximum(place, code - _KEPT), code + _KEPT))
            low, high = torch.zeros_like(code), torch.full_like(code, 2 ** planes.bits[0] - 1)
            if planes.bits == (8,) and planes.offset == "centre" and groups == 1:
                down, up = room(code.flatten(1) - planes.centre[0])
                if bool((torch.minimum(down, up) >= 0).all()):
                    low = torch.maximum(low, code - down.reshape(code.shape))
                    high = torch.minimum(high, code + up.reshape(code.shape))
            self.register_buffer("low", low)
            self.register_buffer("high", high)

    def scales(self) -> list[nn.Parameter]:
        """What is trained of scales and shifts."""
        return [p for p in (self.a, self.b) if p is not None]

    @staticmethod
    def _wide(per_group: Tensor) -> Tensor:
        return per_group.unsqueeze(-1)

    def _scales(self) -> tuple[Tensor, Tensor]:
        scale = self.scale * (1 + self.a).clamp_min(_LEAST)  # [planes, out, groups]
        if self.b is not None:
            return scale, self.shift + self.scale[0].abs() * self.b
        if self.planes.offset == "centre":
            return scale, centred(scale, self.planes.centre)
        return scale, -scale[0] * self.zero

    def _codes(self) -> Tensor:
        if self.v is None:
            return self.whole
        place = self.v.clamp(self.low, self.high)
        return (place + (place.round() - place).detach()).unsqueeze(0)

    def forward(self, _: Tensor) -> Tensor:
        """The weight, in its own shape."""
        scale, shift = self._scales()
        codes = self._codes()
        weight = (self._wide(scale) * codes).sum(0) + self._wide(shift)  # [out, groups, group]
        weight = weight.flatten(1)[:, : self.planes.inputs]
        if (basis := self.planes.basis) is not None:
            weight = basis.inverse(weight)
        return weight.reshape(self.planes.shape)

    @torch.no_grad()
    def result(self) -> IntegerPlanes:
        """What was learned, as it is stored; the scales of prefixes (nested codes) stay."""
        planes = self.planes
        scale, shift = self._scales()
        if self.v is not None:
            codes = self._codes().round().flatten(2)[..., : planes.inputs]
            planes = replace(planes, codes=codes.to(planes.codes.dtype))
        held = round_scales(scale, planes.scale_bits)
        if planes.offset == "float":
            shift = round_scales(shift, planes.scale_bits, signed=True)
        elif planes.offset == "centre":
            shift = centred(held, planes.centre)
        else:
            shift = -held[0] * self.zero
        return replace(planes, scale=held, shift=shift)


def attach(model: Model, names: list[str], behind: dict[str, Tensor]) -> dict[str, Grid]:
    """Make quantized weights of `model` computed from trainable grids.

    Args:
        model: a copy that is given up afterwards; its parametrized weights stay so.
        names: of parameters in `model.planes`.
        behind: float weights by name, for codes to be learned from. A weight that is not among
            them, has another shape, several planes or removed connections, holds its codes.

    Returns:
        Grids by name; weights that an embedding holds are left out.
    """
    tied = {name: group for group in model.tied() for name in group}
    made = {}
    for name in names:
        holders = [parent_of(model.module, other) for other in tied.get(name, (name,))]
        if any(isinstance(holder, nn.Embedding) for holder, _ in holders):
            continue
        planes, weight = model.planes[name], behind.get(name)
        learned = planes.is_integer and name not in model.masks and name not in tied
        if weight is None or weight.shape != planes.shape or not learned:
            weight = None
        made[name] = Grid(planes, weight)
        for holder, own in holders:
            parametrize.register_parametrization(holder, own, made[name], unsafe=True)
    return made
