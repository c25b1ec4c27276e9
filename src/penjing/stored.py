"""The fields of `IntegerPlanes` from the tensors and the description they are stored as.

    codesK     packed codes of plane K, uint8 [out, bytes of a row]
    scale      [planes, out, groups], [1, out, groups] where all planes share them;
               float32, float16, or uint8 beside `scale_step`, see `penjing.scales`
    shift      [out, groups] likewise (offset `float`)
    zero       packed zero points of all groups, uint8 [1, bytes] (offset `zero`)
    tableK     int8 or int16 [entries, dim] of plane K, where no earlier plane has the same
    scale_K, shift_K   what was fitted to the first K planes alone

What a description says sizes no allocation: every tensor is checked against it first.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from penjing import codebooks, scales
from penjing.errors import InputError
from penjing.packing import TERNARY, is_width, row_bytes, unpack_bits, values
from penjing.scheme import WIDTHS

__all__ = ["fields", "is_shared", "names", "places", "scale_parts"]

_MOST_PLANES = 16


def is_shared(scale: Tensor) -> bool:
    """Whether several planes [planes, out, groups] all have the same scales."""
    return len(scale) > 1 and bool((scale == scale[:1]).all())


def scale_parts(pairs: Mapping[int, tuple[Tensor, Tensor]], *, shifts: bool) -> dict[str, Tensor]:
    """What is stored of scales and shifts, by name, all [planes, out, groups].

    Args:
        pairs: scale [planes, out, groups] and shift [out, groups]; 0 is the whole weight, k what
            was fitted to the first k planes.
        shifts: store them as well.
    """
    found = {}
    for k, (scale, shift) in pairs.items():
        tail = f"_{k}" if k else ""
        # A copy, as safetensors stores no two tensors that share memory.
        found[f"scale{tail}"] = (scale[:1] if is_shared(scale) else scale).clone()
        if shifts:
            found[f"shift{tail}"] = shift.clone().unsqueeze(0)
    return found


def places(tables: Sequence[Tensor], named: Sequence[str]) -> list[str | int]:
    """For each plane the name of its table, or the first plane that has the same."""
    found: list[str | int] = []
    for k, name in enumerate(named):
        same = (j for j in range(k) if not named[j] and torch.equal(tables[j], tables[k]))
        found.append(name or next(same, k))
    return found


def names(description: Mapping[str, Any]) -> set[str]:
    """Names of the tensors that belong to a description."""
    found = {f"codes{k}" for k in range(len(description["bits"]))}
    scaled = ["scale", *(f"scale_{k}" for k in description.get("nested", ()))]
    if description.get("offset", "float") == "float":
        scaled += [name.replace("scale", "shift") for name in scaled]
    found |= set(scaled)
    if description.get("scale_bits", 32) == 8:
        found |= {f"{name}_step" for name in scaled}
    if description.get("offset") == "zero":
        found.add("zero")
    tables = description.get("tables", ())
    return found | {f"table{k}" for k, at in enumerate(tables) if at == k}


def fields(tensors: Mapping[str, Tensor], description: Mapping[str, Any]) -> dict[str, Any]:
    """Keyword arguments of `IntegerPlanes`.

    Raises:
        InputError: tensors that are missing or do not fit the description.
    """
    try:
        return _fields(tensors, description)
    except (KeyError, TypeError, ValueError, IndexError, OverflowError, RuntimeError) as error:
        raise InputError(
            "a description of integer planes that does not fit",
            got=f"{type(error).__name__}: {error}",
        ) from error


def _fields(tensors: Mapping[str, Tensor], description: Mapping[str, Any]) -> dict[str, Any]:
    bits = tuple(TERNARY if b == TERNARY else int(b) for b in description["bits"])
    shape = tuple(int(n) for n in description["shape"])
    group, scale_bits = int(description["group"]), int(description.get("scale_bits", 32))
    dim, window = int(description.get("dim", 1)), int(description.get("window", 1))
    nested = [int(k) for k in description.get("nested", ())]
    offset = str(description.get("offset", "float"))
    centre = tuple(float(c) for c in description.get("centre", ()))
    sound = (
        0 < len(bits) <= _MOST_PLANES
        and all(is_width(b) for b in bits)
        and shape
        and min(shape) >= 0
        and group >= 1
        and scale_bits in WIDTHS
        and 1 <= dim <= 64
        and 1 <= window <= 16
        and all(1 <= k < len(bits) for k in nested)
        and offset in ("float", "zero", "centre")
        and (offset != "centre" or len(centre) == len(bits))
        and all(map(math.isfinite, centre))
    )
    if not sound:
        raise InputError("description of integer planes", got=dict(description))
    out, inputs = shape[0], math.prod(shape[1:])
    groups = -(-inputs // group)
    codes = _codes(tensors, bits, out, -(-inputs // dim))
    found: dict[str, Any] = {
        "bits": bits, "group": group, "shape": shape, "scale_bits": scale_bits,
        "offset": offset, "centre": centre, "window": window,
        "rotation": description.get("rotation"),
    }  # fmt: skip
    pairs: dict[int, tuple[Tensor, Tensor]] = {}
    for k in [*nested, 0]:
        name = f"scale_{k}" if k else "scale"
        planes = k or len(bits)
        scale = _scale(tensors, name, (planes, out, groups), scale_bits)
        if offset == "centre":
            shift = scales.centred(scale, centre[:planes])
        elif offset == "zero":
            shift = -scale[0] * _zero(tensors, bits[0], out, groups)
        else:
            named = name.replace("scale", "shift")
            one = {n: t.unsqueeze(0) if n == named else t for n, t in tensors.items()}
            shift = scales.read(one, named, (1, out, groups), scale_bits, signed=True)[0]
        pairs[k] = (scale, shift)
    found["scale"], found["shift"] = pairs.pop(0)
    found["nested_scales"] = pairs
    if description.get("tables") is not None:
        found |= _tables(tensors, description["tables"], codes, bits, window, dim)
    return found | {"codes": codes}


def _codes(tensors: Mapping[str, Tensor], bits: tuple[float, ...], out: int, n: int) -> Tensor:
    for k, b in enumerate(bits):
        packed, size = tensors.get(f"codes{k}"), (out, row_bytes(n, b))
        if packed is None or packed.dtype != torch.uint8 or tuple(packed.shape) != size:
            got = "none" if packed is None else f"{packed.dtype} {tuple(packed.shape)}"
            raise InputError(f"codes {k} of integer planes", got=got, allowed=f"uint8 {size}")
    dtype = torch.int32 if max(bits) > 8 else torch.uint8
    return torch.stack(
        [unpack_bits(tensors[f"codes{k}"], b, n).to(dtype) for k, b in enumerate(bits)]
    )


def _within(k: int, codes: Tensor, entries: int, reach: int) -> None:
    """Refuse codes beyond a table; codes without one are below 2**bits by their packing."""
    # Entries of several codes are made later: their table must be whole.
    most = int(codes.max()) if reach == 0 and codes.numel() else reach - 1
    if most >= entries:
        raise InputError(f"codes {k} of integer planes", got=most, allowed=f"< {entries}")


def _scale(
    tensors: Mapping[str, Tensor], name: str, shape: tuple[int, int, int], bits: int
) -> Tensor:
    stored = tensors.get(name)
    shared = stored is not None and stored.ndim == 3 and len(stored) == 1
    own = (1, *shape[1:]) if shared else shape
    return scales.read(tensors, name, own, bits).expand(shape).contiguous()


def _zero(tensors: Mapping[str, Tensor], bits: float, out: int, groups: int) -> Tensor:
    packed, size = tensors.get("zero"), (1, row_bytes(out * groups, bits))
    if packed is None or packed.dtype != torch.uint8 or tuple(packed.shape) != size:
        got = "none" if packed is None else f"{packed.dtype} {tuple(packed.shape)}"
        raise InputError("zero of integer planes", got=got, allowed=f"uint8 {size}")
    return unpack_bits(packed, bits, out * groups).reshape(out, groups).float()


def _tables(
    tensors: Mapping[str, Tensor],
    places: Sequence[Any],
    codes: Tensor,
    bits: tuple[float, ...],
    window: int,
    dim: int,
) -> dict[str, Any]:
    if len(places) != len(bits):
        raise InputError("tables of integer planes", got=len(places), allowed=len(bits))
    found: list[Tensor] = []
    for k, at in enumerate(places):
        if isinstance(at, str):
            own: Tensor | None = codebooks.table(at)
        elif type(at) is int and 0 <= at <= k:
            own = tensors.get(f"table{at}")
        else:
            own = None
        most = values(bits[k]) ** window
        kinds = (torch.int8, torch.int16)
        if own is None or own.ndim != 2 or own.dtype not in kinds or own.shape[1] != dim:
            got = "none" if own is None else f"{own.dtype} {tuple(own.shape)}"
            raise InputError(f"table {k} of integer planes", got=got, allowed=f"[entries, {dim}]")
        _within(k, codes[k], len(own), most if window > 1 else 0)
        found.append(own[:most])
    entries = max(len(t) for t in found)
    wide = max((t.dtype for t in found), key=lambda d: d.itemsize)
    # Rows that no code reaches make the tables equally long.
    padded = [torch.nn.functional.pad(t.to(wide), (0, 0, 0, entries - len(t))) for t in found]
    used = tuple(at if isinstance(at, str) else "" for at in places)
    return {"tables": torch.stack(padded), "table_names": used}
