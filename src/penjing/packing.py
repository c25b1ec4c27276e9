"""Unsigned codes in as few bytes as they need, row by row.

b-bit codes make one stream of bits, least significant first: 8 codes fill b bytes. Codes of
three values (bits = 1.6) go five to a byte, byte = sum over j of code[j] * 3**j, as 3**5 = 243.
"""

from __future__ import annotations

import torch
from torch import Tensor

from penjing.errors import InputError

__all__ = ["TERNARY", "is_width", "pack_bits", "row_bytes", "unpack_bits", "values"]

TERNARY = 1.6
_MOST = 16
_POWERS = (1, 3, 9, 27, 81)


def is_width(bits: object) -> bool:
    """Whether codes can be this wide: 1.6, or a whole number from 1 to 16."""
    return bits == TERNARY or (type(bits) is int and 1 <= bits <= _MOST)


def values(bits: float) -> int:
    """How many different codes there are."""
    return 3 if bits == TERNARY else 2 ** int(bits)


def row_bytes(n: int, bits: float) -> int:
    """Bytes of a row of `n` packed codes."""
    return -(-n // 5) if bits == TERNARY else -(-n * int(bits) // 8)


def _dtype(bits: float) -> torch.dtype:
    return torch.uint8 if bits <= 8 else torch.int32


def pack_bits(codes: Tensor, bits: float) -> Tensor:
    """Pack unsigned codes.

    Args:
        codes: uint8 or int32 [rows, n], each below `values(bits)`.
        bits: 1.6, or 1 to 16.

    Returns:
        uint8 [rows, row_bytes(n, bits)].
    """
    rows, n = codes.shape
    if bits == 8:
        return codes.to(torch.uint8).contiguous()
    each = 5 if bits == TERNARY else 8
    padded = torch.nn.functional.pad(codes, (0, -n % each))
    blocks = padded.reshape(rows, padded.shape[1] // each, each)
    if bits == TERNARY:
        weights = torch.tensor(_POWERS, dtype=torch.uint8)
        joined: Tensor = (blocks.to(torch.uint8) * weights).sum(-1, dtype=torch.uint8)
        return joined
    width = int(bits)
    packed = torch.zeros(rows, blocks.shape[1], width, dtype=torch.uint8)
    for j in range(8):
        code = blocks[..., j].to(torch.int32)
        first, off = divmod(j * width, 8)
        code = code << off
        for place in range(first, (j * width + width - 1) // 8 + 1):
            packed[..., place] |= (code & 255).to(torch.uint8)
            code = code >> 8
    return packed.reshape(rows, blocks.shape[1] * width)[:, : row_bytes(n, bits)].contiguous()


def unpack_bits(packed: Tensor, bits: float, n: int) -> Tensor:
    """Inverse of `pack_bits`.

    Args:
        packed: uint8 [rows, row_bytes(n, bits)].
        bits: 1.6, or 1 to 16.
        n: codes in a row.

    Returns:
        [rows, n] uint8, or int32 from 9 bits on.

    Raises:
        InputError: a byte that no five ternary codes make.
    """
    if bits == 8:
        return packed
    rows = packed.shape[0]
    if bits == TERNARY:
        if packed.numel() and int(packed.max()) >= 3**5:
            raise InputError("a byte of ternary codes", got=int(packed.max()), allowed="0 to 242")
        digits = [packed.div(power, rounding_mode="floor") % 3 for power in _POWERS]
        return torch.stack(digits, -1).reshape(rows, packed.shape[1] * 5)[:, :n].contiguous()
    width = int(bits)
    if 8 % width == 0:
        shifts = torch.arange(0, 8, width, dtype=torch.uint8)
        fields: Tensor = (packed.unsqueeze(-1) >> shifts) & (2**width - 1)
        return fields.reshape(rows, packed.shape[1] * (8 // width))[:, :n].contiguous()
    padded = torch.nn.functional.pad(packed, (0, -packed.shape[1] % width))
    blocks = padded.reshape(rows, padded.shape[1] // width, width)
    codes = torch.empty(rows, blocks.shape[1], 8, dtype=_dtype(bits))
    for j in range(8):
        first, off = divmod(j * width, 8)
        last = (j * width + width - 1) // 8
        code = blocks[..., first].to(torch.int32)
        for place in range(first + 1, last + 1):
            code |= blocks[..., place].to(torch.int32) << (8 * (place - first))
        codes[..., j] = (code >> off) & (2**width - 1)
    return codes.reshape(rows, blocks.shape[1] * 8)[:, :n].contiguous()
