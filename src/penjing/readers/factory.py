"""Models made by the user's own Python: `package.module:function` or `file.py:function`.

The convention. The function takes no argument and returns a `torch.nn.Module`. Beside it, in
the same Python file, may stand

    example() -> Tensor | dict[str, Tensor]     a small batch, batch dimension first; needed
    preprocess(image: PIL.Image) -> ndarray     float32 [channels, height, width]
    classes: list[str]                          names of the outputs

An `example` of four dimensions together with `preprocess` makes an image model, whose input
is called `pixel_values`. Otherwise the inputs are called `x0`, `x1`, ... or by the dict's keys,
and are passed in that order as positional arguments.

Weights come from a `.safetensors`, or a `.pth` that is read weights-only, and must be exactly
the module's. `weights="own"` says that the function has already loaded them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from penjing.errors import InputError
from penjing.files import fingerprint
from penjing.model import Batch, Model, Source
from penjing.readers._files import regular
from penjing.readers._safetensors import read_safetensors
from penjing.readers._tensors import assign, read_pickle, to_float32
from penjing.readers._transformers import straighten
from penjing.registry import attribute_of

__all__ = ["build", "read", "recognises"]

_EXAMPLE = "add `def example(): return torch.zeros(1, 3, 224, 224)`, your shape, beside it"


def recognises(path: Path) -> bool:
    """A `place:function` that is not the name of an existing file."""
    place, colon, function = str(path).rpartition(":")
    return bool(place and colon and function.isidentifier() and not path.exists())


def read(path: Path, *, weights: str | Path | None = None) -> Model:
    """Call the function and load `weights` into what it returns.

    Raises:
        InputError: no weights, no `example`, a function that fails, tensors that do not fit.
    """
    place, _, function = str(path).rpartition(":")
    spec = f"{Path(place).resolve()}:{function}" if place.endswith(".py") else str(path)
    if weights is None:
        raise InputError(
            f"{path} needs weights",
            allowed=".safetensors or .pth, or `own` when the function loads them",
            next="pass --weights FILE",
        )
    details: dict[str, Any] = {"factory": spec, "location": spec}
    details["weights"] = "own" if str(weights) == "own" else str(Path(weights).resolve())
    if (names := _beside(spec, "classes")) is not None:
        details["classes"] = [str(name) for name in names]
    model = build(Source("factory", str(path), "", details))
    if details["weights"] == "own":
        tensors = to_float32(model.module.state_dict(), path)
        digest = hashlib.sha256()
        for name, tensor in tensors.items():
            digest.update(name.encode() + tensor.numpy().tobytes())
        mark = digest.hexdigest()
    else:
        file = Path(details["weights"])
        tensors, mark = to_float32(_tensors(file), file), fingerprint([file])
        assign(model.module, tensors, file, _covered(model, tensors))
    if next(model.module.parameters(), None) is None:
        raise InputError(f"the module of {path} has no parameters")
    details["interface"] = model.interface
    if straighten(model.module):
        details["straightened"] = True
    model.source = Source("factory", str(path), mark, details)
    _try(model)
    return model


def build(source: Source) -> Model:
    """Call the function again: a module with whatever weights it starts with, in eval mode."""
    spec = str(source.details["factory"])
    try:
        module = attribute_of(spec)()
    except InputError:
        raise
    except Exception as error:
        # The user's own code.
        raise InputError(f"{spec} fails", got=f"{type(error).__name__}: {error}") from error
    if not isinstance(module, nn.Module):
        raise InputError(f"{spec} returns", got=type(module).__name__, allowed="a torch.nn.Module")
    make, preprocess = _beside(spec, "example"), _beside(spec, "preprocess")
    if not callable(make):
        raise InputError(f"the inputs of {spec} are not known", next=_EXAMPLE)
    if source.details.get("straightened"):  # artifacts of before have the layers as they were
        straighten(module)
    example = _batch(make(), spec, image=callable(preprocess))
    interface: Any = "image" if set(example) == {"pixel_values"} and preprocess else "tensor"
    return Model(module.float().eval(), interface, example, source, preprocess=preprocess)


def _beside(spec: str, name: str) -> Any:
    place = spec.rpartition(":")[0]
    try:
        return attribute_of(f"{place}:{name}")
    except InputError as error:
        # Only the name may be absent; a file that does not import is an error of its own.
        if f"has no {name}" in error.what:
            return None
        raise


def _batch(value: Any, spec: str, *, image: bool) -> Batch:
    if isinstance(value, Tensor):
        value = {"pixel_values" if image and value.dim() == 4 else "x0": value}
    elif isinstance(value, list | tuple):
        value = {f"x{i}": v for i, v in enumerate(value)}
    good = isinstance(value, Mapping) and all(isinstance(v, Tensor) for v in value.values())
    if not good or not value or any(v.dim() == 0 or not len(v) for v in value.values()):
        raise InputError(
            f"example() beside {spec}", got=type(value).__name__, allowed="tensors [batch, ...]"
        )
    return dict(value)


def _tensors(file: Path) -> dict[str, Tensor]:
    if file.suffix == ".safetensors":
        return read_safetensors(file)
    if file.suffix in (".pth", ".pt", ".bin"):
        return read_pickle(file)
    regular(file)
    raise InputError("weights of a factory", got=file.name, allowed=".safetensors, .pth, .pt, .bin")


def _covered(model: Model, tensors: Mapping[str, Tensor]) -> set[str]:
    return {n for group in model.tied() if any(m in tensors for m in group) for n in group}


def _try(model: Model) -> None:
    try:
        with torch.no_grad():
            output = model.run(model.example)
    except Exception as error:
        # The user's own forward.
        reason = f"{type(error).__name__}: {error}"
        raise InputError(f"{model.source.path} does not run on its example", got=reason) from error
    if not isinstance(output, Tensor):
        raise InputError(f"output of {model.source.path}", got=type(output), allowed="one tensor")
