"""IntegerPlanes: the one formula for every quantized weight.

    w[o, i] = sum over k of scale[k, o, g(i)] * z[k, o, i] + shift[o, g(i)]

with g(i) = i // group and integers z. Without tables z[k, o, i] = codes[k, o, i], unsigned.
With tables a code looks up a vector of `dim` integers, z[k, o, dim * j + d] =
tables[k, codes[k, o, j], d]; with `window` L the entry is made of L codes of a column, the newest
lowest: sum over l < L of codes[k, o - l, j] * 2**(bits * l), codes above the first row being 0.

Integer quantization is one plane of b bits with shift = -scale * zero_point; binary codes are
planes of one bit; ternary codes planes of three values. A convolution's weight [out, in, h, w]
is the matrix [out, in * h * w]. With a rotation Q this is w Q^T, what multiplies x Q^T.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from penjing import codebooks, scales
from penjing.errors import InputError
from penjing.packing import is_width, pack_bits, row_bytes, unpack_bits, values
from penjing.rotation import Rotation
from penjing.scales import centred, round_scales
from penjing.scheme import Scheme
from penjing.stored import fields, places, scale_parts

__all__ = [
    "IntegerPlanes",
    "Scheme",
    "pack_bits",
    "round_scales",
    "unpack_bits",
    "window_entries",
]

_MOST_DIM = 64
_MOST_WINDOW_BITS = 16


@dataclass(frozen=True, eq=False)
class IntegerPlanes:
    """A weight as a sum of scaled integer planes.

    Attributes:
        codes: [planes, out, n] uint8, or int32 where a plane has more than 8 bits; plane k below
            2**bits[k] (3 for 1.6 bits); n = ceil(in / dim), or in without tables.
        bits: bits of a code of each plane: 1.6, or 1 to 16.
        scale: float32 [planes, out, groups].
        shift: float32 [out, groups].
        group: consecutive inputs that share a scale; the last group may be shorter.
        shape: shape of the weight this stands for; shape[0] is out.
        tables: int8 or int16 [planes, entries, dim], or None.
        table_names: a name of `penjing.codebooks` for a plane whose table is not stored, else "".
        window: codes of a column that make one entry of a table.
        scale_bits: 32, 16 or 8, of a stored scale; the values here are rounded to it already.
        offset: how the shift is stored: `float` as a scale; `zero`, an integer zero point of
            bits[0] bits, shift = -scale * zero, one plane; `centre`, not at all.
        centre: with offset `centre` one number a plane, see `centred`.
        nested_scales: (scale [k, out, groups], shift [out, groups]) fitted to the first k planes
            alone.
        rotation: seed of the `Rotation` of the inputs that the planes are written in, or None.

    Raises:
        InputError: parts that do not fit each other.
    """

    codes: Tensor
    bits: tuple[int | float, ...]
    scale: Tensor
    shift: Tensor
    group: int
    shape: tuple[int, ...] = field(default=())
    tables: Tensor | None = field(default=None, kw_only=True)
    table_names: tuple[str, ...] = field(default=(), kw_only=True)
    window: int = field(default=1, kw_only=True)
    scale_bits: int = field(default=32, kw_only=True)
    offset: str = field(default="float", kw_only=True)
    centre: tuple[float, ...] = field(default=(), kw_only=True)
    nested_scales: Mapping[int, tuple[Tensor, Tensor]] = field(default_factory=dict, kw_only=True)
    rotation: int | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        if self.codes.ndim != 3 or self.group < 1:
            got = f"codes {tuple(self.codes.shape)}, group {self.group}"
            raise InputError(
                "integer planes", got=got, allowed="codes [planes, out, n], group >= 1"
            )
        planes, out, n = self.codes.shape
        if self.codes.dtype not in (torch.uint8, torch.int32):
            raise InputError(
                "codes of integer planes", got=self.codes.dtype, allowed="uint8, int32"
            )
        if len(self.bits) != planes or not planes or not all(is_width(b) for b in self.bits):
            raise InputError(
                "bits of integer planes", got=self.bits, allowed=f"{planes} of 1.6 or 1..16"
            )
        self._check_tables()
        if not self.shape:
            object.__setattr__(self, "shape", (out, n * self.dim))
        if self.shape[0] != out or -(-self.inputs // self.dim) != n:
            raise InputError("shape of integer planes", got=self.shape, allowed=(out, n * self.dim))
        object.__setattr__(self, "shift", self._checked(self.scale, self.shift))
        nested = {}
        for k, (scale, shift) in self.nested_scales.items():
            if not 1 <= k < planes:
                raise InputError("nested integer planes", got=k, allowed=f"1 to {planes - 1}")
            nested[k] = (scale, self._checked(scale, shift, k))
        object.__setattr__(self, "nested_scales", nested)
        if self.basis is not None and len(self.shape) != 2:
            raise InputError("rotated integer planes", got=self.shape, allowed="[out, in]")

    def _check_tables(self) -> None:
        planes = len(self.bits)
        if self.tables is None:
            if self.table_names or self.window != 1:
                raise InputError("integer planes without tables", got="table names or a window")
            return
        size, dtypes = tuple(self.tables.shape), (torch.int8, torch.int16)
        if len(size) != 3 or size[0] != planes or self.tables.dtype not in dtypes:
            raise InputError(
                "tables of integer planes", got=f"{self.tables.dtype} {size}",
                allowed=f"int8 or int16 [{planes}, entries, dim]",
            )  # fmt: skip
        if not self.table_names:
            object.__setattr__(self, "table_names", ("",) * planes)
        widths = {b * self.window for b in self.bits}
        narrow = self.window == 1 or (
            size[2] == 1 and all(type(w) is int and w <= _MOST_WINDOW_BITS for w in widths)
        )
        if not (1 <= size[2] <= _MOST_DIM and self.window >= 1 and narrow):
            raise InputError("window of integer planes", got=(self.window, size[2]))
        if len(self.table_names) != planes:
            raise InputError("table names", got=self.table_names, allowed=f"{planes}")
        for k, name in enumerate(self.table_names):
            if name and not torch.equal(codebooks.table(name), self._table(k)):
                raise InputError(
                    "table of integer planes", got="others", allowed=f"those of {name}"
                )

    def _checked(self, scale: Tensor, shift: Tensor, planes: int = 0) -> Tensor:
        """The shift exactly as reading it back gives it."""
        planes, out = planes or len(self.bits), self.shape[0]
        groups = -(-self.inputs // self.group)
        for name, tensor, shape in (
            ("scale", scale, (planes, out, groups)),
            ("shift", shift, (out, groups)),
        ):
            if tuple(tensor.shape) != shape:
                raise InputError(
                    f"{name} of integer planes", got=tuple(tensor.shape), allowed=shape
                )
        rounded = {"scale": (scale, round_scales(scale, self.scale_bits))}
        if self.offset == "float":
            exact = shift
            rounded["shift"] = (shift, round_scales(shift, self.scale_bits, signed=True))
        elif self.offset == "zero" and len(self.bits) == 1 and self.tables is None:
            zero = _zeros(scale[0], shift)
            if zero.numel() and not 0 <= float(zero.min()) <= float(zero.max()) < values(
                self.bits[0]
            ):
                raise InputError("zero points of integer planes", got="beyond the codes")
            exact = -scale[0] * zero
        elif self.offset == "centre" and len(self.centre) == len(self.bits):
            exact = centred(scale, self.centre[:planes])
        else:
            got = f"{self.offset} with {len(self.bits)} planes, centre {self.centre}"
            raise InputError("offset of integer planes", got=got, allowed="float, zero, centre")
        if self.scale_bits != 32 and not all(torch.equal(*pair) for pair in rounded.values()):
            raise InputError(
                "integer planes", got=f"scales or shifts that {self.scale_bits} bits do not hold",
                next="round them with round_scales before the codes are chosen",
            )  # fmt: skip
        if exact is not shift and not torch.equal(exact, shift):
            off = (exact - shift).abs() > 1e-3 * scale.abs().amax(0)
            if bool(off.any()):
                raise InputError("shift of integer planes", got=f"not of offset {self.offset}")
        return exact

    @property
    def dim(self) -> int:
        """Weights that one code stands for."""
        return 1 if self.tables is None else int(self.tables.shape[2])

    @property
    def inputs(self) -> int:
        """Columns of the weight as a matrix."""
        return math.prod(self.shape[1:])

    @property
    def basis(self) -> Rotation | None:
        """The rotation of the inputs, None where there is none."""
        return None if self.rotation is None else Rotation(self.inputs, self.rotation)

    @property
    def is_integer(self) -> bool:
        """Whether it is one plane of unsigned integers, without a table."""
        return len(self.bits) == 1 and self.tables is None and self.bits[0] in range(1, 9)

    def _entries(self, k: int) -> int:
        """Entries of plane k's table that its codes can reach."""
        reach = values(self.bits[k]) ** self.window
        return int(min(reach, 0 if self.tables is None else self.tables.shape[1]))

    def _table(self, k: int) -> Tensor:
        """Plane k's table [entries, dim], without the rows that only fill it up."""
        assert self.tables is not None
        return self.tables[k, : self._entries(k)]

    def _places(self) -> list[str | int]:
        tables = [self._table(k) for k in range(len(self.bits))]
        return places(tables, self.table_names)

    def _parts(self) -> dict[str, Tensor]:
        pairs = {0: (self.scale, self.shift), **self.nested_scales}
        return scale_parts(pairs, shifts=self.offset == "float")

    @property
    def stored_bytes(self) -> int:
        """Bytes of everything `tensors` stores."""
        out, n = self.codes.shape[1:]
        total = sum(out * row_bytes(n, bits) for bits in self.bits)
        for scale in self._parts().values():
            total += scales.scale_bytes(scale.shape, self.scale_bits)
        if self.offset == "zero":
            total += row_bytes(self.shift.numel(), self.bits[0])
        if self.tables is not None:
            size = self.dim * self.tables.element_size()
            own = [k for k, at in enumerate(self._places()) if at == k]
            total += sum(self._entries(k) * size for k in own)
        return total

    @property
    def stored_bits(self) -> float:
        """Stored bits a weight, everything counted."""
        return 8 * self.stored_bytes / max(math.prod(self.shape), 1)

    @property
    def zero_point(self) -> Tensor:
        """Integer zero points [out, groups] of a single plane: round(-shift / scale).

        Raises:
            InputError: several planes, or a table: there is no such integer.
        """
        if not self.is_integer:
            raise InputError("zero points", got=self.kind, allowed="one plane of integers")
        return _zeros(self.scale[0], self.shift)

    @property
    def signed(self) -> Tensor | None:
        """int8 [out, in], codes - 2**(bits - 1): what integer kernels take as w / scale.

        None unless this is one symmetric plane of 7 or 8 bits with one scale a row.
        """
        if not self.is_integer or self.bits not in ((7,), (8,)) or self.group < self.inputs:
            return None
        half = 2 ** (int(self.bits[0]) - 1)
        if not bool((self.zero_point == half).all()):
            return None
        signed: Tensor = self.codes[0].to(torch.int16) - half
        return signed.to(torch.int8)

    @property
    def kind(self) -> str:
        """In a few words what this is, for messages."""
        count = f"{len(self.bits)} plane{'s' * (len(self.bits) > 1)}"
        widths = "+".join(f"{b:g}" for b in self.bits)
        kind = f"{count} of {widths} bits" + ("" if self.tables is None else " with tables")
        return kind + ("" if self.rotation is None else ", rotated")

    def spread(self, per_group: Tensor) -> Tensor:
        """Repeat [..., groups] along the inputs of each group: [..., in]."""
        return per_group.repeat_interleave(self.group, dim=-1)[..., : self.inputs]

    def integers(self, k: int) -> Tensor:
        """The integers z [out, in] of plane k, before its scale."""
        codes = self.codes[k]
        if self.tables is None:
            return codes
        entries = window_entries(codes, self.bits[k], self.window)
        return self.tables[k][entries].flatten(1)[:, : self.inputs]

    def dequantize(self) -> Tensor:
        """The float32 weight, in its original shape and basis."""
        weight = self.spread(self.shift).clone()  # [out, in]
        for k, scale in enumerate(self.scale):
            weight += self.spread(scale) * self.integers(k)
        if (basis := self.basis) is not None:
            weight = basis.inverse(weight)
        return weight.reshape(self.shape)

    def nested(self, k: int) -> IntegerPlanes:
        """The first k planes, with the scales that were fitted to them where there are such.

        Raises:
            InputError: fewer than k planes.
        """
        if not 1 <= k <= len(self.bits):
            raise InputError("planes", got=k, allowed=f"1 to {len(self.bits)}")
        centre = self.centre[:k]
        if k in self.nested_scales:
            scale, shift = self.nested_scales[k]
        else:
            scale, shift = self.scale[:k], self.shift
            if self.offset == "centre":
                shift = centred(scale, centre)
        return replace(
            self,
            codes=self.codes[:k],
            bits=self.bits[:k],
            scale=scale,
            shift=shift,
            tables=None if self.tables is None else self.tables[:k],
            table_names=self.table_names[:k],
            centre=centre,
            nested_scales={j: pair for j, pair in self.nested_scales.items() if j < k},
        )

    def tensors(self) -> dict[str, Tensor]:
        """Packed tensors as they are stored; `from_tensors` is the inverse."""
        stored = {
            f"codes{k}": pack_bits(codes, bits)
            for k, (codes, bits) in enumerate(zip(self.codes, self.bits, strict=True))
        }
        for name, scale in self._parts().items():
            signed = name.startswith("shift")
            own = scales.store(name, scale, self.scale_bits, signed=signed)
            # A shift has no planes: [out, groups].
            stored |= {n: t.squeeze(0) if signed and n == name else t for n, t in own.items()}
        if self.offset == "zero":
            zero = _zeros(self.scale[0], self.shift).reshape(1, -1).to(self.codes.dtype)
            stored["zero"] = pack_bits(zero, self.bits[0])
        if self.tables is not None:
            for k, at in enumerate(self._places()):
                if at == k:
                    stored[f"table{k}"] = self._table(k).clone()
        return stored

    def describe(self) -> dict[str, object]:
        """What `from_tensors` needs besides the tensors, JSON-ready; defaults are left out."""
        found: dict[str, Any] = {
            "bits": list(self.bits), "group": self.group, "shape": list(self.shape),
        }  # fmt: skip
        if self.tables is not None:
            found |= {"tables": self._places(), "dim": self.dim}
        usual = {
            "scale_bits": 32, "offset": "float", "centre": [], "window": 1, "rotation": None,
            "nested": [],
        }  # fmt: skip
        own = [self.scale_bits, self.offset, list(self.centre), self.window, self.rotation]
        pairs = zip(usual.items(), [*own, sorted(self.nested_scales)], strict=True)
        return found | {name: value for (name, default), value in pairs if value != default}

    @staticmethod
    def from_tensors(
        tensors: Mapping[str, Tensor], description: Mapping[str, Any]
    ) -> IntegerPlanes:
        """Unpack what `tensors` and `describe` gave.

        Raises:
            InputError: tensors that are missing or do not fit the description.
        """
        return IntegerPlanes(**fields(tensors, description))


def window_entries(codes: Tensor, bits: float, window: int) -> Tensor:
    """Entries int64 [out, n] that `window` codes [out, n] of a column make."""
    entries = codes.long()
    for late in range(1, window):
        past = torch.nn.functional.pad(codes, (0, 0, late, 0))[: len(codes)]
        entries += past.long() << (int(bits) * late)
    return entries


def _zeros(scale: Tensor, shift: Tensor) -> Tensor:
    return torch.where(scale == 0, 0.0, torch.round(-shift / scale))
