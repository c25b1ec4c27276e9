"""A tensor with many zeros as one bit for each element and the values that are no zero.

    bits     bit i % 8, the lowest first, of byte i // 8 is 1 where element i is stored
    values   those elements in order, in the tensor's own type

n elements of s bytes, k of them stored, take ceil(n / 8) + k s bytes: less than dense from a share
of 1 / (8 s) zeros on, 3.2 % in float32. Half of them gone are 53 % of the bytes; which of the six
2:4 patterns each four weights have would take 0.75 bits a weight in place of 1, 1.5 % of the bytes.

Stored is what has any bit set, so that a negative zero, NaN and infinities come back as they were.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from penjing.errors import InputError
from penjing.packing import pack_bits, row_bytes, unpack_bits

__all__ = ["ENTRY", "bits_of", "mask_of", "pack", "pays", "stored_bytes", "unpack"]

ENTRY = 128
"""About what one more entry takes in the header of a file, in bytes."""

_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _stored(tensor: Tensor) -> Tensor:
    """Bool [n]: which elements are stored."""
    flat = tensor.detach().contiguous().reshape(-1)
    return flat.view(_WORDS[tensor.element_size()]) != 0


def stored_bytes(tensor: Tensor) -> int:
    """Bytes of what `pack` gives."""
    kept = int(_stored(tensor).sum())
    return row_bytes(tensor.numel(), 1) + kept * tensor.element_size()


def pays(tensor: Tensor) -> bool:
    """Whether a file gets smaller by it."""
    real = tensor.dtype.is_floating_point and not tensor.is_meta
    return real and stored_bytes(tensor) + ENTRY < tensor.numel() * tensor.element_size()


def bits_of(mask: Tensor) -> Tensor:
    """A mask of n elements as uint8 [ceil(n / 8)]."""
    return pack_bits(mask.cpu().to(torch.uint8).reshape(1, -1), 1)[0]


def mask_of(bits: Tensor | None, shape: Sequence[int]) -> Tensor:
    """The bool mask of that shape that `bits_of` was given.

    Raises:
        InputError: bits that are missing or do not fit the shape; nothing of the shape's size is
            made before that is known.
    """
    size = tuple(n for n in shape if type(n) is int and n >= 0)
    if len(size) != len(shape):
        raise InputError("shape of a bitmask", got=list(shape), allowed="whole numbers from 0 on")
    count = math.prod(size)
    if bits is None or bits.dtype != torch.uint8 or tuple(bits.shape) != (row_bytes(count, 1),):
        got = "none" if bits is None else f"{bits.dtype} {tuple(bits.shape)}"
        allowed = f"torch.uint8 {(row_bytes(count, 1),)}"
        raise InputError(f"bits of a tensor {list(size)}", got=got, allowed=allowed)
    whole = unpack_bits(bits.reshape(1, -1), 1, 8 * len(bits))[0]  # [8 * bytes]
    if bool(whole[count:].any()):
        raise InputError("a bitmask", got=f"bits set beyond its {count} elements")
    return whole[:count].bool().reshape(size)


def pack(tensor: Tensor) -> dict[str, Tensor]:
    """The bits uint8 [ceil(n / 8)] and values [k] of a tensor of n elements; see `unpack`."""
    kept = _stored(tensor).cpu()
    flat = tensor.detach().cpu().reshape(-1)
    return {"bits": bits_of(kept), "values": flat[kept]}


def unpack(parts: Mapping[str, Tensor], shape: Sequence[int]) -> Tensor:
    """The tensor of that shape, bit for bit as it was given to `pack`.

    Raises:
        InputError: parts that are missing or do not fit each other or the shape.
    """
    if set(parts) != {"bits", "values"}:
        raise InputError("parts of a bitmask", got=sorted(parts), allowed="bits, values")
    kept, values = mask_of(parts["bits"], shape), parts["values"]
    if values.ndim != 1 or not values.dtype.is_floating_point:
        got = f"{values.dtype} {tuple(values.shape)}"
        raise InputError("values of a bitmask", got=got, allowed="floats, one row")
    if (found := int(kept.sum())) != len(values):
        raise InputError("values of a bitmask", got=len(values), allowed=f"{found}, its bits set")
    tensor = torch.zeros(kept.shape, dtype=values.dtype)
    tensor[kept] = values
    return tensor
