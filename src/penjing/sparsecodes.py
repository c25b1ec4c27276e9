"""A quantized weight with many zeros as one bit for each weight and the codes that are no zero.

    bits     bit i % 8, the lowest first, of byte i // 8 is 1 where the code of weight i is stored
    codes0   those codes in order, packed as one row
    the rest as `IntegerPlanes.tensors` gives it

The code of any other weight is its group's zero point: scale * zero + shift is 0. Weights
[out, in] in b bits of which k are stored take ceil(out in / 8) + ceil(k b / 8) bytes: half of them
gone, 5 bits in place of 8, or 3 in place of 4. Only one plane of integers has zero points.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from penjing import bitmask
from penjing.errors import InputError
from penjing.packing import is_width, pack_bits, row_bytes, unpack_bits
from penjing.planes import IntegerPlanes

__all__ = ["from_tensors", "pays", "stored_bytes", "tensors"]


def _zeros(planes: IntegerPlanes) -> Tensor:
    """The code that stands for zero, uint8 [out, in]."""
    return planes.spread(planes.zero_point).to(planes.codes.dtype)


def stored_bytes(planes: IntegerPlanes) -> int:
    """Bytes of what `tensors` gives."""
    codes, bits = planes.codes[0], planes.bits[0]
    kept = int((codes != _zeros(planes)).sum())
    dense = len(codes) * row_bytes(codes.shape[1], bits)
    return planes.stored_bytes - dense + row_bytes(codes.numel(), 1) + row_bytes(kept, bits)


def pays(planes: IntegerPlanes) -> bool:
    """Whether a file gets smaller by it."""
    return planes.is_integer and stored_bytes(planes) + bitmask.ENTRY < planes.stored_bytes


def tensors(planes: IntegerPlanes) -> dict[str, Tensor]:
    """The parts by name; see `from_tensors`."""
    codes = planes.codes[0]
    kept = codes != _zeros(planes)  # [out, in]
    return planes.tensors() | {
        "bits": bitmask.bits_of(kept),
        "codes0": pack_bits(codes[kept].reshape(1, -1), planes.bits[0]),
    }


def from_tensors(parts: Mapping[str, Tensor], description: Mapping[str, Any]) -> IntegerPlanes:
    """Planes equal to those that `tensors` and `IntegerPlanes.describe` were called on.

    Raises:
        InputError: parts that are missing or do not fit each other or the description.
    """
    try:
        (width,), shape = description["bits"], [int(n) for n in description["shape"]]
        out, inputs = shape[0], math.prod(shape[1:])
    except (KeyError, TypeError, ValueError, IndexError, OverflowError) as error:
        raise InputError("a description of sparse codes", got=repr(error)) from error
    if not (is_width(width) and width <= 8):
        raise InputError("bits of sparse codes", got=width, allowed="1 to 8")
    kept = bitmask.mask_of(parts.get("bits"), (out, inputs))
    count, packed = int(kept.sum()), parts.get("codes0")
    size = (1, row_bytes(count, width))
    if packed is None or packed.dtype != torch.uint8 or tuple(packed.shape) != size:
        got = "none" if packed is None else f"{packed.dtype} {tuple(packed.shape)}"
        raise InputError(f"codes of {count} bits set", got=got, allowed=f"torch.uint8 {size}")
    codes = torch.zeros(out, inputs, dtype=torch.uint8)
    codes[kept] = unpack_bits(packed, width, count)[0]
    dense = {name: part for name, part in parts.items() if name != "bits"}
    planes = IntegerPlanes.from_tensors(dense | {"codes0": pack_bits(codes, width)}, description)
    if not planes.is_integer:
        raise InputError("sparse codes", got=planes.kind, allowed="one plane of integers")
    return replace(planes, codes=torch.where(kept, codes, _zeros(planes)).unsqueeze(0))
