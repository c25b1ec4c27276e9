"""GGUF's blocks of 32 weights, each with float16 numbers of its own.

    Q4_0, Q5_0   w = d * (code - 2**(bits - 1))        Q8_0   w = d * q, q = code - 128, int8
    Q4_1, Q5_1   w = d * code + m

A block holds d, m if any, the fifth bits (one of 32 bits for each weight), then the low four bits:
byte j has weight j below and weight j + 16 above. A group of several blocks repeats its numbers.
"""

from __future__ import annotations

import numpy as np
import torch
from gguf.constants import GGMLQuantizationType
from torch import Tensor

from penjing.planes import IntegerPlanes

__all__ = ["BLOCK", "blocks", "kind_of", "plain", "problem"]

BLOCK = 32
_KINDS = {
    (4, True): GGMLQuantizationType.Q4_0, (4, False): GGMLQuantizationType.Q4_1,
    (5, True): GGMLQuantizationType.Q5_0, (5, False): GGMLQuantizationType.Q5_1,
    (8, True): GGMLQuantizationType.Q8_0,
}  # fmt: skip


def problem(planes: IntegerPlanes) -> str:
    """Why a weight cannot be stored; empty when it can."""
    if not planes.is_integer or planes.rotation is not None:
        return planes.kind
    if (planes.bits[0], _is_centred(planes)) not in _KINDS:
        return f"{planes.bits[0]} bits" + ("" if _is_centred(planes) else ", asymmetric")
    if planes.inputs % BLOCK or (planes.group % BLOCK and planes.group < planes.inputs):
        return f"groups of {planes.group} in rows of {planes.inputs}"
    for numbers in (planes.scale, planes.shift):
        rounded = numbers.half().float()
        if bool(((rounded - numbers).abs() > 2**-10 * numbers.abs()).any()):
            return "scales that float16 does not hold"
    return ""


def kind_of(planes: IntegerPlanes) -> GGMLQuantizationType:
    """The type that stores a weight without `problem`."""
    return _KINDS[int(planes.bits[0]), _is_centred(planes)]


def blocks(planes: IntegerPlanes, rows: Tensor | None = None) -> np.ndarray:
    """The bytes of a weight, uint8 [out, bytes of a row].

    Args:
        planes: a weight without `problem`; scales and shifts are rounded to float16.
        rows: order of the rows in the file.
    """
    out, count = planes.codes.shape[1], planes.inputs // BLOCK
    order = torch.arange(out) if rows is None else rows
    codes = planes.codes[0][order].reshape(out * count, BLOCK).numpy()
    parts = [_numbers(planes, planes.scale[0], order)]
    if planes.bits[0] == 8:
        parts.append((codes.astype(np.int16) - 128).astype(np.int8).view(np.uint8))
    else:
        if not _is_centred(planes):
            parts.append(_numbers(planes, planes.shift, order))
        if planes.bits[0] == 5:
            parts.append(np.packbits(codes >> 4, axis=1, bitorder="little"))
        low = codes & 15
        parts.append(low[:, : BLOCK // 2] | (low[:, BLOCK // 2 :] << 4))
    joined = np.concatenate(parts, axis=1)  # [out * count, bytes of a block]
    return np.ascontiguousarray(joined.reshape(out, count * joined.shape[1]))


def plain(value: Tensor) -> tuple[np.ndarray, GGMLQuantizationType]:
    """An unquantized tensor: float16 where that holds a matrix exactly, else float32."""
    array = value.detach().float().contiguous()
    if array.ndim > 1 and torch.equal(array.half().float(), array):
        return array.half().numpy(), GGMLQuantizationType.F16
    return array.numpy(), GGMLQuantizationType.F32


def _is_centred(planes: IntegerPlanes) -> bool:
    """Whether the zero point is in the middle of the codes all over."""
    middle = 2.0 ** (planes.bits[0] - 1)
    return torch.equal(-planes.scale[0] * middle, planes.shift)


def _numbers(planes: IntegerPlanes, per_group: Tensor, order: Tensor) -> np.ndarray:
    """float16 numbers of each block as bytes: [out * blocks of a row, 2]."""
    spread = planes.spread(per_group)[order][:, ::BLOCK].contiguous()  # [out, blocks]
    return spread.half().numpy().reshape(-1, 1).view(np.uint8)
