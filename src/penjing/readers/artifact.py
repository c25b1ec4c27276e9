"""Penjing's own folder: `manifest.json`, `structure.json`, `weights/*.safetensors`, `assets/`.

The empty module is built again from the source's description, the structural edits are made
again, and the stored tensors put in; quantized weights are dequantized into the parameters:

    w = sum over k of scale[k] * codes[k] + shift

and pruned ones are zeros but where the stored bits say (`penjing.bitmask`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from torch import Tensor

from penjing import bitmask, sparsecodes
from penjing.cache import CacheGrid
from penjing.edits import perform, replay
from penjing.errors import InputError, UsageError
from penjing.files import read_json, sha256
from penjing.graph import find_blocks
from penjing.indices import from_text
from penjing.model import Model, Source
from penjing.planes import IntegerPlanes
from penjing.readers._files import regular
from penjing.readers._safetensors import read_safetensors
from penjing.readers._tensors import assign, to_float32
from penjing.readers._transformers import check_config, read_tokenizer
from penjing.recipe import ActivationRange, Edit

__all__ = ["check", "read", "recognises"]

_FORMAT = 1
_STRUCTURES = 1, 2
_MOST_TENSORS = 100_000


def recognises(path: Path) -> bool:
    """A folder with a `manifest.json`."""
    return path.is_dir() and (path / "manifest.json").exists()


def check(folder: Path, *, of: Sequence[str] = ("weights/", "structure.json")) -> dict[str, Any]:
    """The manifest, after every file it lists was found with its size.

    Args:
        folder: an artifact.
        of: beginnings of the names of files whose SHA-256 is looked at too.

    Raises:
        InputError: a file that is missing, changed, or not inside the folder.
    """
    manifest = read_json(regular(folder / "manifest.json", folder))
    files = manifest.get("files") if isinstance(manifest, dict) else None
    if not isinstance(files, dict) or manifest.get("format") != _FORMAT:
        got = manifest.get("format") if isinstance(manifest, dict) else type(manifest).__name__
        raise InputError(f"{folder} is not an artifact of format {_FORMAT}", got=f"format {got}")
    for name, entry in files.items():
        parts = PurePosixPath(name)
        if parts.is_absolute() or ".." in parts.parts:
            raise InputError(f"{folder}/manifest.json names a file outside", got=name)
        path = regular(folder / name, folder)
        if path.stat().st_size != entry["size"]:
            raise InputError(
                f"{path} has changed", got=f"{path.stat().st_size} B", allowed=f"{entry['size']} B"
            )
        if name.startswith(tuple(of)) and (found := sha256(path)) != entry["sha256"]:
            raise InputError(
                f"{path} has changed", got=f"SHA-256 {found[:12]}...",
                allowed=f"{entry['sha256'][:12]}...", next="make or copy the artifact again",
            )  # fmt: skip
    return dict(manifest)


def read(path: Path, *, build: Callable[[Source], Model], planes: int | None = None) -> Model:
    """Load an artifact.

    Args:
        path: the folder.
        build: gives the empty model of a source.
        planes: use only the first so many of weights that have more.

    Raises:
        InputError: a damaged artifact, or a factory whose code is gone.
        UsageError: `planes` that no weight has.
    """
    manifest = check(path)
    table = read_json(regular(path / "structure.json", path), limit=1_000_000_000)
    tensors: dict[str, Tensor] = {}
    for name in sorted(manifest["files"]):
        if name.startswith("weights/"):
            tensors |= to_float32(read_safetensors(path / name, path), path / name)
    try:
        origin = table["source"]
        details, kind = dict(origin["details"]), str(origin["kind"])
        if "config" in details:
            details["config"] = check_config(details["config"], _MOST_TENSORS, path)
        assets = tuple(sorted(p for p in (path / "assets").glob("*") if p.is_file()))
        source = Source(kind, str(origin["path"]), str(origin["fingerprint"]), details, assets)
        model = build(source)
        model.blocks = find_blocks(model.module) if model.interface != "weights" else ()
        if table["format"] not in _STRUCTURES:
            raise InputError(
                f"format of {path}/structure.json", got=table["format"], allowed="1 or 2",
                next="install a newer penjing",
            )  # fmt: skip
        replay(model, [_whole(entry) for entry in table["structure"]])
        channels = {n: tensors.pop(f"{n}::channels", None) for n in table["activations"]}
        grids = {n: CacheGrid(b, **_own(n, tensors)) for n, b in table.get("cache", {}).items()}
        quantized = {n: _planes(n, d, tensors) for n, d in table["planes"].items()}
        if planes is not None:
            quantized = _first(quantized, planes)
        tensors |= {name: p.dequantize() for name, p in quantized.items()}
        for name in table["masked"]:
            if name not in quantized and (parts := _own(name, tensors)):
                tensors[name] = _sparse(name, parts, model.module.get_parameter(name).shape)
        _fill(model, tensors, path)
        model.planes = quantized
        model.masks = {name: model.module.get_parameter(name) != 0 for name in table["masked"]}
        for name, (scale, zero) in table["activations"].items():
            value = ActivationRange(float(scale), int(zero), channels[name])
            perform(model, Edit("activation", name, value, "as stored"))
        for name, (scale, zero) in table.get("outputs", {}).items():
            value = ActivationRange(float(scale), int(zero))
            perform(model, Edit("output", name, value, "as stored"))
        for name, grid in grids.items():
            perform(model, Edit("cache", name, grid, "as stored"))
        model.blocks = tuple(table["blocks"])
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise InputError(f"{path}/structure.json does not fit its weights", got=reason) from error
    if model.interface in ("embedding", "classifier", "causal"):
        model.tokenizer = read_tokenizer(path / "assets") if assets else None
    return model


def _whole(entry: dict[str, Any]) -> dict[str, Any]:
    """An edit with its indices as lists, as format 1 has them."""
    if "slices" not in entry:
        return entry
    return entry | {
        "slices": [[path, dim, from_text(kept) if isinstance(kept, str) else kept]
                   for path, dim, kept in entry["slices"]]
    }  # fmt: skip


def _own(name: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """What is stored as `name::part`, by part, taken out of `tensors`."""
    prefix = f"{name}::"
    return {k.removeprefix(prefix): tensors.pop(k) for k in list(tensors) if k.startswith(prefix)}


def _planes(name: str, description: dict[str, Any], tensors: dict[str, Tensor]) -> IntegerPlanes:
    parts = _own(name, tensors)
    build = sparsecodes.from_tensors if "bits" in parts else IntegerPlanes.from_tensors
    try:
        return build(parts, description)
    except InputError as error:
        raise InputError(f"{name} is not soundly stored", got=error) from error


def _sparse(name: str, parts: dict[str, Tensor], shape: tuple[int, ...]) -> Tensor:
    try:
        return bitmask.unpack(parts, shape)
    except InputError as error:
        raise InputError(f"{name} is not soundly stored", got=error) from error


def _first(quantized: dict[str, IntegerPlanes], planes: int) -> dict[str, IntegerPlanes]:
    most = max((len(p.bits) for p in quantized.values()), default=0)
    if not 1 <= planes <= most:
        allowed = f"1 to {most}" if most else "none: no weight is quantized"
        raise UsageError("planes", got=planes, allowed=allowed)
    return {n: p.nested(min(planes, len(p.bits))) for n, p in quantized.items()}


def _fill(model: Model, tensors: dict[str, Tensor], path: Path) -> None:
    groups = model.tied()
    stored = {group: next((n for n in group if n in tensors), None) for group in groups}
    given = {n for group, first in stored.items() if first for n in group}
    assign(model.module, tensors, path, given)
    for group, first in stored.items():
        for name in group if first else ():
            holder, _, last = name.rpartition(".")
            value = model.module.get_parameter(str(first))
            setattr(model.module.get_submodule(holder), last, value)
