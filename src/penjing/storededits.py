"""Edits as tensors and a JSON text, for a journal."""

from __future__ import annotations

import json
from typing import Any

import torch
from torch import Tensor

from penjing.cache import CacheGrid
from penjing.planes import IntegerPlanes
from penjing.recipe import ActivationRange, Edit, Nothing, Patch, Setting, Slice

__all__ = ["listed", "pack", "unpack"]


def listed(value: tuple[Slice | Setting, ...]) -> dict[str, Any]:
    """Slices and settings, JSON-ready."""
    return {
        "slices": [[s.path, s.dim, s.kept.tolist()] for s in value if isinstance(s, Slice)],
        "set": [[s.path, s.name, s.value] for s in value if isinstance(s, Setting)],
    }


def pack(edits: list[Edit]) -> tuple[dict[str, Tensor], str]:
    """Edits as safetensors-ready tensors and a JSON text; `unpack` is the inverse."""
    tensors: dict[str, Tensor] = {}
    table = []
    for number, edit in enumerate(edits):
        entry: dict[str, Any] = {
            "kind": edit.kind, "path": edit.path, "why": edit.why, "note": dict(edit.note),
        }  # fmt: skip
        value = edit.value
        if isinstance(value, IntegerPlanes):
            entry["planes"] = value.describe()
            tensors |= {f"{number}.{k}": t.contiguous() for k, t in value.tensors().items()}
        elif isinstance(value, Tensor):
            tensors[f"{number}.value"] = value.contiguous()
        elif isinstance(value, Patch):
            entry["position"] = value.position
            tensors[f"{number}.weight"] = value.weight.contiguous()
            tensors[f"{number}.bias"] = value.bias.contiguous()
            if value.inner is not None:
                tensors[f"{number}.inner"] = value.inner.contiguous()
        elif isinstance(value, ActivationRange):
            entry["range"] = [value.scale, value.zero_point]
            if value.channels is not None:
                tensors[f"{number}.channels"] = value.channels.contiguous()
        elif isinstance(value, CacheGrid):
            entry["cache"] = value.bits
            tensors |= {f"{number}.{k}": t.contiguous() for k, t in value.tensors().items()}
        elif isinstance(value, tuple):
            entry |= listed(value)
        elif isinstance(value, str):
            entry["norm"] = value
        elif isinstance(value, Nothing):
            entry["nothing"] = [value.width, value.more]
        table.append(entry)
    return _separate(tensors), json.dumps(table)


def _separate(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copies of tensors that share memory, which safetensors does not store."""
    seen: set[int] = set()
    for name, tensor in tensors.items():
        place = tensor.untyped_storage().data_ptr()
        tensors[name] = tensor.clone() if place in seen else tensor
        seen.add(place)
    return tensors


def unpack(tensors: dict[str, Tensor], text: str) -> list[Edit]:
    """Inverse of `pack`."""
    edits = []
    for number, entry in enumerate(json.loads(text)):
        own = {k.partition(".")[2]: t for k, t in tensors.items() if k.split(".")[0] == str(number)}
        value: Any = own.get("value")
        if "planes" in entry:
            value = IntegerPlanes.from_tensors(own, entry["planes"])
        elif "position" in entry:
            value = Patch(own["weight"], own["bias"], entry["position"], own.get("inner"))
        elif "range" in entry:
            scale, zero = entry["range"]
            value = ActivationRange(scale, zero, own.get("channels"))
        elif "cache" in entry:
            value = CacheGrid(entry["cache"], **own)
        elif "slices" in entry:
            slices = (Slice(p, d, torch.tensor(k)) for p, d, k in entry["slices"])
            value = (*slices, *(Setting(*one) for one in entry["set"]))
        elif "norm" in entry:
            value = entry["norm"]
        elif "nothing" in entry:
            value = Nothing(*entry["nothing"])
        edits.append(Edit(entry["kind"], entry["path"], value, entry["why"], entry["note"]))
    return edits
