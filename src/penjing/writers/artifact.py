"""Write the artifact: a folder that is whole or not there.

manifest.json           every file with size and SHA-256, source, recipe, versions, metrics
recipe.toml             the steps, replayable
structure.json          how to rebuild the module: source and structural edits
weights/*.safetensors   plain tensors; planes as `name::codes0`, `::scale`, `::shift`; pruned
                        ones with `name::bits`, see `penjing.bitmask` and `penjing.sparsecodes`
assets/                 tokenizer and preprocessing files
"""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from penjing import bitmask, sparsecodes
from penjing.errors import InputError
from penjing.files import read_json, sha256, whole_folder, write_json
from penjing.indices import to_text
from penjing.model import Model
from penjing.recipe import Recipe

__all__ = ["extend", "save"]

_FORMAT = 1
# Of structure.json; in 1 indices are lists.
_STRUCTURE = 2
_SHARD = 2_000_000_000


def save(
    model: Model,
    output: Path,
    *,
    recipe: Recipe | None = None,
    extra: Callable[[Path], None] | None = None,
    metrics: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> None:
    """Write `model` as an artifact.

    Args:
        model: its weights, planes, masks, ranges and structural edits are stored.
        output: the folder to make.
        recipe: what was done to the model.
        extra: adds further files (exports, results, a report) to the folder it is given.
        metrics: JSON-ready figures for the manifest.
        overwrite: replace an existing folder.

    Raises:
        InputError: the folder exists or cannot be written; nothing is left behind.
    """
    with whole_folder(output, overwrite) as folder:
        (folder / "weights").mkdir()
        for number, shard in enumerate(_shards(_tensors(model)), 1):
            path = folder / "weights" / f"model-{number:05d}.safetensors"
            save_file(shard, path, metadata={"format": "pt"})
        write_json(folder / "structure.json", _structure(model))
        if recipe is not None:
            (folder / "recipe.toml").write_text(recipe.to_toml(), encoding="utf-8")
        _assets(model, folder / "assets")
        if extra is not None:
            extra(folder)
        manifest = {
            "format": _FORMAT,
            "source": {
                "kind": model.source.kind,
                "path": model.source.path,
                "fingerprint": model.source.fingerprint,
            },
            "recipe": recipe.to_toml() if recipe is not None else None,
            "seed": recipe.seed if recipe is not None else None,
            "versions": _versions(),
            "metrics": {**(metrics or {}), **({"curves": model.curves} if model.curves else {})},
        }
        _finish(folder, manifest)


def extend(
    folder: Path, add: Callable[[Path], None], *, metrics: Mapping[str, Any] | None = None
) -> None:
    """Let `add` put files into an artifact; it is seen with all of them or with none.

    `add` works on a copy of the folder in which `weights/` is shared with the original and
    must not be written to. `metrics` are merged into the manifest's.

    Raises:
        InputError: not an artifact, or it cannot be written; the artifact is as it was.
    """
    manifest = read_json(folder / "manifest.json")
    if not isinstance(manifest, dict) or manifest.get("format") != _FORMAT:
        raise InputError("not an artifact", got=folder, next="give a folder that penjing wrote")
    with whole_folder(folder, overwrite=True) as beside:
        for path in sorted(folder.rglob("*")):
            target = beside / path.relative_to(folder)
            if path.is_dir():
                target.mkdir(parents=True, exist_ok=True)
            elif path.relative_to(folder).parts[0] == "weights":
                _share(path, target)
            elif path.name != "manifest.json" or path.parent != folder:
                shutil.copyfile(path, target)
        add(beside)
        manifest["metrics"] = {**manifest.get("metrics", {}), **(metrics or {})}
        _finish(beside, manifest, folder)


def _share(path: Path, target: Path) -> None:
    try:
        os.link(path, target)
    except OSError:
        # Not every file system has hard links.
        shutil.copyfile(path, target)


def _finish(folder: Path, manifest: dict[str, Any], was: Path | None = None) -> None:
    """Write the manifest; of an artifact that `was`, no damaged file is made a whole one."""
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p != folder / "manifest.json")
    found = {
        p.relative_to(folder).as_posix(): {"size": p.stat().st_size, "sha256": sha256(p)}
        for p in files
    }
    for name, entry in (manifest.get("files") or {}).items():
        new = found.get(name, entry)["sha256"]
        if was is not None and new != entry["sha256"] and sha256(was / name) == new:
            raise InputError(
                f"{was / name} has changed", got=f"SHA-256 {new[:12]}...",
                allowed=f"{entry['sha256'][:12]}...", next="make or copy the artifact again",
            )  # fmt: skip
    manifest["files"] = found
    write_json(folder / "manifest.json", manifest)


def _tensors(model: Model) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    written: set[str] = set()
    for group in model.tied():
        stored = next((n for n in group if n in model.planes), group[0])
        written |= set(group) - {stored}
    for name, tensor in model.module.state_dict().items():
        if name in model.planes:
            planes = model.planes[name]
            packed = sparsecodes.tensors(planes) if model.is_sparse(name) else planes.tensors()
            tensors |= {f"{name}::{part}": t.contiguous() for part, t in packed.items()}
        elif name in written:
            continue
        elif model.is_sparse(name):
            tensors |= {f"{name}::{part}": t for part, t in bitmask.pack(tensor).items()}
        else:
            tensors[name] = tensor.detach().cpu().contiguous()
    for path, found in model.activations.items():
        if found.channels is not None:
            tensors[f"{path}::channels"] = found.channels.clone()
    for path, grid in model.cache.items():
        tensors |= {f"{path}::{part}": t.clone() for part, t in grid.tensors().items()}
    return tensors


def _shards(tensors: dict[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    shard: dict[str, Tensor] = {}
    size = 0
    for name, tensor in tensors.items():
        count = tensor.numel() * tensor.element_size()
        if shard and size + count > _SHARD:
            yield shard
            shard, size = {}, 0
        shard[name] = tensor
        size += count
    yield shard


def _structure(model: Model) -> dict[str, Any]:
    return {
        "format": _STRUCTURE,
        "source": {
            "kind": model.source.kind,
            "path": model.source.path,
            "fingerprint": model.source.fingerprint,
            "details": dict(model.source.details),
        },
        "interface": model.interface,
        "blocks": list(model.blocks),
        "structure": [_short(entry) for entry in model.structure],
        "planes": {name: planes.describe() for name, planes in model.planes.items()},
        "activations": {n: [r.scale, r.zero_point] for n, r in model.activations.items()},
        "outputs": {n: [r.scale, r.zero_point] for n, r in model.outputs.items()},
        "cache": {name: grid.bits for name, grid in model.cache.items()},
        "masked": sorted(model.masks),
    }


def _short(entry: dict[str, Any]) -> dict[str, Any]:
    if "slices" not in entry:
        return entry
    return entry | {"slices": [[path, dim, to_text(kept)] for path, dim, kept in entry["slices"]]}


def _assets(model: Model, folder: Path) -> None:
    if model.source.assets:
        folder.mkdir()
        for path in model.source.assets:
            shutil.copyfile(path, folder / path.name)
    elif model.tokenizer is not None:
        folder.mkdir()
        model.tokenizer.save_pretrained(str(folder))


def _versions() -> dict[str, str]:
    names = ("penjing", "torch", "transformers", "safetensors")
    return {"python": platform.python_version()} | {name: version(name) for name in names}
