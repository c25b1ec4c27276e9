"""Scales as they are stored: 32 bits, 16 bits, or 8 bits and a step (double quantization).

    32 float32      16 float16      8: scale = step * code

with one bfloat16 step for every run of 64 scales of a plane, row after row. The step is
max / 255 rounded to bfloat16, and the largest scale has code 255, so step * code is exact in
float32 and rounding twice changes nothing. Signed numbers (shifts) have codes -127 to 127.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from penjing.errors import InputError, UsageError
from penjing.scheme import WIDTHS

__all__ = [
    "RUN",
    "centred",
    "codes_of",
    "read",
    "round_scales",
    "scale_bytes",
    "steps_of",
    "store",
]

RUN = 64
_HALF = torch.finfo(torch.float16)
# The least float16 above zero: a scale of zero would lose its group.
_LEAST_HALF = 2.0**-24
_LEAST_STEP = torch.finfo(torch.bfloat16).tiny


def _check(bits: int) -> None:
    if bits not in WIDTHS:
        raise UsageError("scale_bits", got=bits, allowed="32, 16 or 8")


def round_scales(scale: Tensor, bits: int, *, signed: bool = False) -> Tensor:
    """The nearest numbers that `bits` bits hold; rounding them again changes nothing.

    Args:
        scale: float [..., out, groups]; with 8 bits every [out, groups] is rounded as a whole,
            so it must be the whole plane's.
        bits: 32, 16 or 8.
        signed: numbers of either sign (shifts); scales of 8 bits are at least 0.

    Returns:
        float32 of the same shape; what was above 0 stays above 0 unless `signed`.

    Raises:
        InputError: a number that is not finite, too large for 16 bits, or below 0.
    """
    _check(bits)
    scale = scale.detach().float()
    if bits == 32 or not scale.numel():
        return scale
    if not bool(torch.isfinite(scale).all()):
        raise InputError("scales have NaN or infinite values")
    if bits == 16:
        if bool((scale.abs() > _HALF.max).any()):
            raise InputError(
                "a scale in 16 bits", got=float(scale.abs().max()), allowed=f"<= {_HALF.max}",
                next="use scale_bits = 32",
            )  # fmt: skip
        rounded = scale.half().float()
        lost = (rounded == 0) & (scale != 0)
        return torch.where(lost, scale.sign() * _LEAST_HALF, rounded)
    codes, step = _codes(scale, signed)
    return _values(codes, step, scale.shape)


def centred(scale: Tensor, centre: tuple[float, ...]) -> Tensor:
    """The shift [out, groups] of planes about their centres: -sum over k of centre_k * scale_k.

    Args:
        scale: float32 [planes, out, groups].
        centre: one number a plane.
    """
    shift = torch.zeros_like(scale[0])
    for middle, own in zip(centre, scale, strict=True):
        shift = shift - own * middle
    return shift


def _codes(scale: Tensor, signed: bool) -> tuple[Tensor, Tensor]:
    """Codes [..., runs, 64] in float32 and steps [..., runs, 1]."""
    if not signed and bool((scale < 0).any()):
        raise InputError(
            "a scale in 8 bits", got=float(scale.min()), allowed="at least 0",
            next="turn the plane's codes around",
        )  # fmt: skip
    flat = scale.flatten(-2)
    runs = _runs(flat)
    top = 127 if signed else 255
    largest = runs.abs().amax(-1, keepdim=True)  # [..., runs, 1]
    step = (largest / top).bfloat16().float().clamp_min(_LEAST_STEP)
    codes = (runs / step).round().clamp(-top, top)
    if not signed:
        codes = torch.where(runs > 0, codes.clamp_min(1), codes)
    # The largest makes the step, and must give the same step when rounded again.
    codes = torch.where((runs.abs() == largest) & (runs != 0), runs.sign() * top, codes)
    return codes, step


def _runs(flat: Tensor) -> Tensor:
    """[..., n] to [..., ceil(n / 64), 64], filled up with zeros."""
    padded = torch.nn.functional.pad(flat, (0, -flat.shape[-1] % RUN))
    return padded.reshape(*flat.shape[:-1], padded.shape[-1] // RUN, RUN)


def _values(codes: Tensor, step: Tensor, shape: torch.Size | tuple[int, ...]) -> Tensor:
    count = shape[-1] * shape[-2]
    return (codes * step).flatten(-2)[..., :count].reshape(shape)


def scale_bytes(shape: Sequence[int], bits: int) -> int:
    """Bytes of stored scales [planes, out, groups]."""
    planes, out, groups = shape
    if bits == 8:
        return planes * (out * groups + 2 * -(-out * groups // RUN))
    return planes * out * groups * bits // 8


def store(name: str, scale: Tensor, bits: int, *, signed: bool = False) -> dict[str, Tensor]:
    """Rounded scales [planes, out, groups] as stored: `name`, and `name`_step with 8 bits."""
    if bits == 32:
        return {name: scale}
    if bits == 16:
        return {name: scale.half()}
    return {
        name: codes_of(scale, signed=signed),
        f"{name}_step": steps_of(scale, signed=signed),
    }


def codes_of(scale: Tensor, *, signed: bool = False) -> Tensor:
    """8-bit codes of rounded scales [planes, out, groups]: uint8, or int8 where `signed`."""
    kind = torch.int8 if signed else torch.uint8
    if not scale.numel():
        return scale.to(kind)
    codes, _ = _codes(scale, signed)
    return codes.flatten(-2)[:, : scale[0].numel()].reshape(scale.shape).to(kind)


def steps_of(scale: Tensor, *, signed: bool = False) -> Tensor:
    """The bfloat16 steps [planes, runs] of rounded scales [planes, out, groups]."""
    if not scale.numel():
        return torch.empty(len(scale), 0, dtype=torch.bfloat16)
    return _codes(scale, signed)[1].squeeze(-1).bfloat16()


def read(
    tensors: Mapping[str, Tensor],
    name: str,
    shape: tuple[int, int, int],
    bits: int,
    *,
    signed: bool = False,
) -> Tensor:
    """Inverse of `store`: float32 of `shape` [planes, out, groups].

    Raises:
        InputError: a tensor is missing or of another shape or type.
    """
    stored = tensors.get(name)
    if stored is None or tuple(stored.shape) != shape:
        got = "none" if stored is None else tuple(stored.shape)
        raise InputError(f"{name} of integer planes", got=got, allowed=shape)
    if bits != 8:
        if not stored.is_floating_point():
            raise InputError(f"{name} of integer planes", got=stored.dtype, allowed="floats")
        return stored.float()
    step = tensors.get(f"{name}_step")
    runs = (shape[0], -(-shape[1] * shape[2] // RUN))
    if stored.is_floating_point() or step is None or tuple(step.shape) != runs:
        got = "none" if step is None else tuple(step.shape)
        raise InputError(f"{name}_step of integer planes", got=got, allowed=runs)
    if not stored.numel():
        return torch.zeros(shape)
    flat = stored.flatten(-2).float()
    codes = _runs(flat)
    return _values(codes, step.float().unsqueeze(-1), shape)
