"""Bare weight files (`.npy`, `.npz`, `.safetensors`, `.pth`): tensors by name, not to run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from penjing import weightfiles
from penjing.errors import InputError
from penjing.files import fingerprint
from penjing.model import Model, Source
from penjing.readers._files import regular
from penjing.readers._safetensors import read_names
from penjing.readers._tensors import assign, read_pickle, to_float32

__all__ = ["build", "read", "recognises"]


def recognises(path: Path) -> bool:
    """A file with the extension of a weight file."""
    return path.suffix in weightfiles.FORMATS and not path.is_dir()


def read(path: Path, *, allow_pickle: bool = False) -> Model:
    """Load a weight file; interface `weights`.

    Raises:
        InputError: damaged, of Python objects, not finite, or already quantized.
    """
    regular(path)
    if path.suffix == ".safetensors":
        read_names(path)
    if path.suffix in (".pth", ".pt"):
        found = read_pickle(path)
    else:
        content = weightfiles.read(path)
        if weightfiles.DESCRIPTION in content.extra:
            raise InputError(
                f"{path} is already quantized", next="penjing quantize --dequantize gives floats"
            )
        found = content.tensors
    tensors = to_float32(found, path)
    if not tensors:
        raise InputError(f"{path} has no tensors")
    shapes = {n: [list(t.shape), str(t.dtype).removeprefix("torch.")] for n, t in tensors.items()}
    details: dict[str, Any] = {
        "tensors": shapes, "interface": "weights", "location": str(path.resolve()),
    }  # fmt: skip
    model = build(Source("weights", str(path), fingerprint([path]), details))
    assign(model.module, tensors, path)
    return model


def build(source: Source) -> Model:
    """The container of `source.details["tensors"]`, on the meta device."""
    tensors: Mapping[str, Any] = source.details["tensors"]
    empty = {
        name: torch.empty(shape, dtype=getattr(torch, kind), device="meta")
        for name, (shape, kind) in tensors.items()
    }
    return Model(_container(empty, source.path), "weights", {}, source)


def _container(tensors: Mapping[str, Tensor], path: str) -> nn.Module:
    """Modules nested as the dots in the names say, so that `named_parameters` gives the names."""
    root = nn.Module()
    for name, tensor in tensors.items():
        *folders, last = name.split(".")
        module = root
        for folder in folders:
            inner = module._modules.get(folder)
            if inner is None:
                inner = module._modules[folder] = nn.Module()
            module = inner
        if not all([*folders, last]) or last in module._modules:
            raise InputError(
                f"name of a tensor in {path}",
                got=name or "an empty name",
                allowed="a path that is neither a part of another nor has empty parts",
            )
        module._parameters[last] = nn.Parameter(tensor, requires_grad=tensor.is_floating_point())
    for module in root.modules():
        if clash := set(module._parameters) & set(module._modules):
            raise InputError(f"{path} has a tensor and a group of one name", got=min(clash))
    return root.eval()
