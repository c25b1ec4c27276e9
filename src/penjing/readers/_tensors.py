"""Tensors on their way into a module: weights-only, float32, finite, exactly those asked for."""

from __future__ import annotations

import zipfile
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from penjing.errors import InputError
from penjing.readers._files import regular

__all__ = ["assign", "named", "read_pickle", "to_float32"]


def named(names: Collection[str]) -> str:
    """The first five names, and how many more there are."""
    first = sorted(names)[:5]
    rest = len(names) - len(first)
    return ", ".join(first) + (f" and {rest} more" if rest else "")


def read_pickle(path: Path, root: Path | None = None) -> dict[str, Tensor]:
    """The state dict in a `.pth` or `.bin`, read with `weights_only=True` and never otherwise.

    A dict whose `state_dict` or `model` entry is the state dict is unwrapped. Compressed
    archives and tensors that claim more elements than the file has bytes are refused:
    both make a small file fill the memory.

    Raises:
        InputError: anything else than tensors by name.
    """
    regular(path, root)
    size = path.stat().st_size
    convert = "save the state dict as .safetensors"
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                packed = [i.filename for i in archive.infolist() if i.compress_type]
            if packed:
                raise InputError(f"{path} is a compressed archive", got=packed[0], next=convert)
        loaded: Any = torch.load(path, map_location="cpu", weights_only=True)
    except InputError:
        raise
    except Exception as error:
        # Unpickling fails in as many ways as there are broken files.
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"{path} cannot be read weights-only", got=reason, next=convert) from error
    for key in ("state_dict", "model"):
        if isinstance(loaded, dict) and isinstance(loaded.get(key), dict):
            loaded = loaded[key]
    if not isinstance(loaded, dict) or not loaded:
        raise InputError(f"{path} holds no state dict", got=type(loaded).__name__, next=convert)
    for name, value in loaded.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise InputError(
                f"{name} in {path} is not a tensor", got=type(value).__name__, next=convert
            )
        if value.numel() * value.element_size() > size:
            raise InputError(f"{name} in {path} is larger than the file", got=tuple(value.shape))
    return dict(loaded)


def to_float32(tensors: Mapping[str, Tensor], path: Path | str) -> dict[str, Tensor]:
    """Floating tensors as contiguous float32, integers and bools as they are.

    Raises:
        InputError: NaN or Inf, or a complex, quantized, sparse or data-less tensor, by name.
    """
    result = {}
    for name, tensor in tensors.items():
        if tensor.is_complex() or tensor.is_quantized or tensor.layout != torch.strided:
            kind = tensor.dtype if tensor.layout == torch.strided else tensor.layout
            raise InputError(f"{name} in {path} has an unusual type", got=kind, allowed="dense")
        if tensor.is_meta:
            raise InputError(f"{name} in {path} has no data", got="a meta tensor")
        value = tensor.detach()
        if value.is_floating_point():
            value = value.to(torch.float32)
            if not bool(torch.isfinite(value).all()):
                bad = int((~torch.isfinite(value)).sum())
                raise InputError(
                    f"{name} in {path} has NaN or Inf",
                    got=f"{bad} of {value.numel()} values",
                    next="repair or retrain the model",
                )
        result[name] = value.contiguous()
    return result


def assign(
    module: nn.Module, tensors: Mapping[str, Tensor], path: Path | str, given: Collection[str] = ()
) -> None:
    """Put `tensors` into `module`, which must ask for exactly these.

    Args:
        module: may be on the meta device; afterwards it is not.
        tensors: float32 by the module's own names.
        path: named in errors.
        given: names that need no tensor, because tying provides them.

    Raises:
        InputError: missing, surplus or misshaped tensors, named.
    """
    wanted = module.state_dict()
    # Batch norm's count of training batches: old files lack it, and evaluation never reads it.
    counts = {n for n in wanted if n.endswith("num_batches_tracked") and n not in tensors}
    tensors = {**tensors, **{name: torch.zeros((), dtype=torch.long) for name in counts}}
    missing = set(wanted) - set(tensors) - set(given)
    surplus = set(tensors) - set(wanted)
    if missing:
        raise InputError(
            f"{path} lacks {len(missing)} tensors",
            got=f"missing {named(missing)}" + (f"; surplus {named(surplus)}" if surplus else ""),
            next="nothing is filled in; give the whole checkpoint",
        )
    if surplus:
        raise InputError(
            f"{path} has {len(surplus)} tensors the model has no place for", got=named(surplus)
        )
    for name, tensor in tensors.items():
        if tensor.shape != wanted[name].shape:
            raise InputError(
                f"{name} in {path} has another shape",
                got=tuple(tensor.shape),
                allowed=tuple(wanted[name].shape),
            )
        if tensor.is_floating_point() != wanted[name].is_floating_point():
            raise InputError(
                f"{name} in {path} has another type",
                got=tensor.dtype,
                allowed=wanted[name].dtype,
                next="give the unquantized checkpoint",
            )
    # Owned copies: the file may change under a memory map.
    own = {name: tensor.clone() for name, tensor in tensors.items()}
    module.load_state_dict(own, strict=False, assign=True)
