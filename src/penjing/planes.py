"""IntegerPlanes: the one formula for every quantized weight.

    w[o, i] = sum over k of scale[k, o, g(i)] * codes[k, o, i] + shift[o, g(i)]

with g(i) = i // group. Integer quantization is one plane of b bits; `shift` is
-scale * zero_point. Codes are unsigned and bit-packed little end first, row by row.
A convolution's weight [out, in, h, w] is stored as the matrix [out, in * h * w].
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from penjing.errors import InputError, UsageError

__all__ = ["IntegerPlanes", "Scheme", "pack_bits", "unpack_bits"]


@dataclass(frozen=True)
class Scheme:
    """How a weight [out, in] is to be quantized to one plane of integers.

    Attributes:
        bits: 2 to 8.
        group: consecutive inputs that share a scale; 0 is the whole row.
        symmetric: the zero point is fixed at 2**(bits - 1).

    Raises:
        UsageError: a value outside these ranges.
    """

    bits: int
    group: int = 0
    symmetric: bool = False

    def __post_init__(self) -> None:
        if type(self.bits) is not int or not 2 <= self.bits <= 8:
            raise UsageError("bits", got=repr(self.bits), allowed="a whole number from 2 to 8")
        if type(self.group) is not int or self.group < 0:
            raise UsageError(
                "group", got=repr(self.group), allowed="a whole number; 0 is the whole row"
            )
        if type(self.symmetric) is not bool:
            raise UsageError("symmetric", got=repr(self.symmetric), allowed="true or false")

    def group_of(self, inputs: int) -> int:
        """Inputs that share a scale in a weight of `inputs` columns, at least 1."""
        return min(self.group or inputs, inputs) or 1

    @property
    def levels(self) -> int:
        """The largest code, 2**bits - 1."""
        return int(2**self.bits - 1)


def pack_bits(codes: Tensor, bits: int) -> Tensor:
    """Pack unsigned codes into bytes, least significant bits first.

    Args:
        codes: uint8 [rows, n], each below 2**bits.
        bits: 1 to 8.

    Returns:
        uint8 [rows, ceil(n * bits / 8)].
    """
    rows, n = codes.shape
    if bits == 8:
        return codes.contiguous()
    shifts = torch.arange(bits, dtype=torch.uint8)
    stream = ((codes.unsqueeze(-1) >> shifts) & 1).reshape(rows, n * bits)  # [rows, n * bits]
    stream = torch.nn.functional.pad(stream, (0, -stream.shape[1] % 8))
    return _joined(stream.reshape(rows, stream.shape[1] // 8, 8))


def unpack_bits(packed: Tensor, bits: int, n: int) -> Tensor:
    """Inverse of `pack_bits`: uint8 [rows, ceil(n * bits / 8)] to uint8 [rows, n]."""
    if bits == 8:
        return packed
    rows = packed.shape[0]
    shifts = torch.arange(8, dtype=torch.uint8)
    stream = ((packed.unsqueeze(-1) >> shifts) & 1).reshape(rows, packed.shape[1] * 8)
    return _joined(stream[:, : n * bits].reshape(rows, n, bits))


def _joined(bits: Tensor) -> Tensor:
    """uint8 [rows, n, bits] of 0 and 1, least significant first, to uint8 [rows, n]."""
    total = torch.zeros(bits.shape[:-1], dtype=torch.uint8)
    # A sum over the last dimension would be in int64, eight times the memory.
    for place in range(bits.shape[-1]):
        total |= bits[..., place] << place
    return total


@dataclass(frozen=True, eq=False)
class IntegerPlanes:
    """A weight as a sum of scaled integer planes.

    Attributes:
        codes: uint8 [planes, out, in], plane k below 2**bits[k].
        bits: bits of each plane.
        scale: float32 [planes, out, groups].
        shift: float32 [out, groups].
        group: consecutive inputs that share a scale; the last group may be shorter.
        shape: shape of the weight this stands for; shape[0] is out.
    """

    codes: Tensor
    bits: tuple[int, ...]
    scale: Tensor
    shift: Tensor
    group: int
    shape: tuple[int, ...] = field(default=())

    def __post_init__(self) -> None:
        if self.codes.ndim != 3 or self.group < 1:
            got = f"codes {tuple(self.codes.shape)}, group {self.group}"
            raise InputError(
                "integer planes", got=got, allowed="codes [planes, out, in], group >= 1"
            )
        planes, out, inputs = self.codes.shape
        groups = -(-inputs // self.group)
        if not self.shape:
            object.__setattr__(self, "shape", (out, inputs))
        wanted = {"scale": (planes, out, groups), "shift": (out, groups)}
        for name, shape in wanted.items():
            if tuple(getattr(self, name).shape) != shape:
                raise InputError(
                    f"{name} of integer planes", got=tuple(getattr(self, name).shape), allowed=shape
                )
        if len(self.bits) != planes or not all(1 <= b <= 8 for b in self.bits):
            raise InputError("bits of integer planes", got=self.bits, allowed=f"{planes} of 1..8")

    @property
    def stored_bytes(self) -> int:
        """Bytes of packed codes, scales and shifts as `tensors` stores them."""
        _, out, inputs = self.codes.shape
        codes = sum(out * -(-inputs * bits // 8) for bits in self.bits)
        return codes + 4 * (self.scale.numel() + self.shift.numel())

    @property
    def zero_point(self) -> Tensor:
        """Integer zero points [out, groups] of a single plane: round(-shift / scale)."""
        return torch.round(-self.shift / self.scale[0])

    def spread(self, per_group: Tensor) -> Tensor:
        """Repeat [..., groups] along the inputs of each group: [..., in]."""
        return per_group.repeat_interleave(self.group, dim=-1)[..., : self.codes.shape[-1]]

    def dequantize(self) -> Tensor:
        """The float32 weight, in its original shape."""
        weight = self.spread(self.shift).clone()  # [out, in]
        for codes, scale in zip(self.codes, self.scale, strict=True):
            weight += self.spread(scale) * codes
        return weight.reshape(self.shape)

    def tensors(self) -> dict[str, Tensor]:
        """Packed tensors as they are stored; `from_tensors` is the inverse."""
        packed = {
            f"codes{k}": pack_bits(c, b)
            for k, (c, b) in enumerate(zip(self.codes, self.bits, strict=True))
        }
        return packed | {"scale": self.scale, "shift": self.shift}

    def describe(self) -> dict[str, object]:
        """What `from_tensors` needs besides the tensors, JSON-ready."""
        return {"bits": list(self.bits), "group": self.group, "shape": list(self.shape)}

    @staticmethod
    def from_tensors(tensors: dict[str, Tensor], description: dict[str, object]) -> IntegerPlanes:
        """Unpack what `tensors` and `describe` gave.

        Raises:
            InputError: tensors that are missing or do not fit the description.
        """
        bits = tuple(int(b) for b in description["bits"])  # type: ignore[attr-defined]
        shape = tuple(int(n) for n in description["shape"])  # type: ignore[attr-defined]
        group = int(description["group"])  # type: ignore[call-overload]
        inputs = math.prod(shape[1:])
        if (
            not bits
            or group < 1
            or not shape
            or min(shape) < 0
            or not set(bits) <= set(range(1, 9))
        ):
            raise InputError("description of integer planes", got=description)
        codes = []
        for k, b in enumerate(bits):
            packed = tensors.get(f"codes{k}")
            # Checked before anything is unpacked: a description must not size an allocation.
            size = (shape[0], -(-inputs * b // 8))
            if packed is None or packed.dtype != torch.uint8 or tuple(packed.shape) != size:
                got = "none" if packed is None else f"{packed.dtype} {tuple(packed.shape)}"
                raise InputError(f"codes {k} of integer planes", got=got, allowed=f"uint8 {size}")
            codes.append(unpack_bits(packed, b, inputs))
        if missing := {"scale", "shift"} - set(tensors):
            raise InputError("integer planes without", got=", ".join(sorted(missing)))
        return IntegerPlanes(
            torch.stack(codes), bits, tensors["scale"], tensors["shift"], group, shape
        )
