"""How one quantized weight sits in a bare weight file.

A quantized file holds, for each tensor, `name.codes`, `name.scale` and `name.shift` (without
the name for a lone `.npy`) and a JSON description under `penjing`. Codes of 8 bits have the
weight's shape, and with one group a row `scale * codes + shift` broadcasts to it; fewer bits
are packed, least significant first.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from penjing.packing import row_bytes
from penjing.planes import IntegerPlanes
from penjing.stored import names

__all__ = ["FLOATS", "keys", "pack", "plain", "restored", "unpack"]

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def restored(planes: IntegerPlanes, dtype: torch.dtype) -> Tensor:
    """The weight in `dtype`, cut to its range, as a matrix."""
    limits = torch.finfo(dtype)
    return planes.dequantize().double().clamp(limits.min, limits.max).to(dtype)


def plain(planes: IntegerPlanes) -> IntegerPlanes:
    """The same weight with its shift as floats, as a bare file stores it."""
    return replace(planes, offset="float", centre=(), scale_bits=32, nested_scales={})


def pack(planes: IntegerPlanes, tensor: Tensor) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Description and tensors of one weight; one plane is stored to broadcast where it can."""
    planes = plain(planes)
    rows, groups = planes.shift.shape
    description = planes.describe() | {
        "matrix": list(planes.shape),
        "shape": list(tensor.shape),
        "dtype": str(tensor.dtype).removeprefix("torch."),
    }
    stored = planes.tensors()
    if len(planes.bits) > 1:
        return description, stored
    codes = stored.pop("codes0")
    if planes.bits[0] == 8 and planes.dim == 1:
        codes = codes.reshape(tensor.shape)
    scale, shift = planes.scale[0], planes.shift  # [out, groups]
    if groups == 1 and tensor.ndim != 2:
        lead = [rows] if rows > 1 else [1]
        wide = [*lead, *[1] * (tensor.ndim - 1)] if tensor.ndim else []
        scale, shift = scale.reshape(wide), shift.reshape(wide)
    return description, stored | {"codes": codes, "scale": scale, "shift": shift}


def keys(description: Mapping[str, Any]) -> set[str]:
    """Names of the tensors of one weight with this description."""
    found = names(description)
    return found if len(description["bits"]) > 1 else (found - {"codes0"}) | {"codes"}


def unpack(stored: dict[str, Tensor], description: Mapping[str, Any]) -> Tensor:
    """The weight in its dtype and shape; takes `stored` apart.

    Raises:
        InputError, KeyError, TypeError, ValueError, RuntimeError: a damaged file.
    """
    rows, width = (int(n) for n in description["matrix"])
    group = max(int(description["group"]), 1)
    bits = description["bits"]
    if len(bits) == 1:
        # An empty tensor leaves nothing to infer a -1 from.
        size = row_bytes(-(-width // int(description.get("dim", 1))), bits[0])
        stored["codes0"] = stored.pop("codes").reshape(rows, size)
        stored["scale"] = stored["scale"].reshape(1, rows, -(-width // group))
    stored["shift"] = stored["shift"].reshape(rows, -(-width // group))
    built = IntegerPlanes.from_tensors(stored, {**description, "shape": [rows, width]})
    dtype = {str(d).removeprefix("torch."): d for d in FLOATS}[description["dtype"]]
    return restored(built, dtype).reshape([int(n) for n in description["shape"]])
