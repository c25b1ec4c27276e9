"""Hugging Face folders: `config.json` with `model.safetensors` or its shards.

The class is built from the configuration, the tensors are read here one by one and must be
exactly those the class asks for: transformers' own loader fills what is missing with random
values. Neither code nor pickles in the folder are run.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from penjing.errors import InputError
from penjing.files import fingerprint, read_json
from penjing.graph import Transposed
from penjing.model import Model, Source
from penjing.readers._files import regular
from penjing.readers._safetensors import read_names, read_safetensors
from penjing.readers._tensors import assign, named, read_pickle, to_float32
from penjing.readers._transformers import build, check_config, choose, read_tokenizer

__all__ = ["read", "recognises"]

_ASSETS = (
    "config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
    "vocab.txt", "vocab.json", "merges.txt", "tokenizer.model", "spiece.model",
    "added_tokens.json", "preprocessor_config.json",
)  # fmt: skip


def recognises(path: Path) -> bool:
    """A folder with a `config.json`."""
    return path.is_dir() and (path / "config.json").exists()


def read(path: Path, *, allow_pickle: bool = False) -> Model:
    """Load an encoder, a decoder or an image classifier, float32, in eval mode.

    Sentence encoders are pooled as their `1_Pooling/config.json` says, else by the mean; a
    final normalization is left out, as similarity by cosine does not see it.

    Raises:
        InputError: anything missing, surplus, misshaped, not finite or unsafe, by name.
    """
    regular(path / "config.json", path)
    files = _weight_files(path, allow_pickle)
    names = _names(files, path)
    config = check_config(read_json(path / "config.json"), len(names), path / "config.json")
    class_name, interface = choose(config, path / "config.json")
    details: dict[str, Any] = {"class": class_name, "interface": interface, "config": config}
    if interface == "embedding":
        details["pooling"] = _pooling(path)
    if interface == "image" and (path / "preprocessor_config.json").exists():
        regular(path / "preprocessor_config.json", path)
        details["preprocessor"] = read_json(path / "preprocessor_config.json")
    details["location"] = str(path.resolve())
    details["allow_pickle"] = allow_pickle
    assets = tuple(regular(path / name, path) for name in _ASSETS if (path / name).exists())
    source = Source("huggingface", str(path), fingerprint(files), details, assets)
    model = build(source)
    if interface != "image" and getattr(model.module, "main_input_name", "") != "input_ids":
        raise InputError(f"{class_name} does not take text", got=path, allowed="text encoders")
    tensors: dict[str, Tensor] = {}
    for file in files:
        found = read_pickle(file, path) if file.suffix == ".bin" else read_safetensors(file, path)
        tensors |= to_float32(found, file)
    fill(model, tensors, path)
    model.tokenizer = None if interface == "image" else read_tokenizer(path)
    return model


def fill(model: Model, tensors: dict[str, Tensor], path: Path) -> None:
    """Rename checkpoint tensors to the module's names, assign them, tie what is tied."""
    tensors = _renamed(model.module, tensors, path)
    for name, layer in model.module.named_modules():
        if isinstance(layer, Transposed) and (own := f"{name}.weight") in tensors:
            tensors[own] = tensors[own].T.contiguous()
    wanted = model.module.state_dict(keep_vars=True)
    unused = [n for n in tensors if n not in wanted and _ignorable(n, model)]
    for name in unused:
        del tensors[name]
    groups: dict[int, list[str]] = {}
    for name, value in wanted.items():
        groups.setdefault(id(value), []).append(name)
    tied = [group for group in groups.values() if len(group) > 1]
    for group in tied:
        present = [name for name in group if name in tensors]
        if any(not torch.equal(tensors[present[0]], tensors[name]) for name in present[1:]):
            raise InputError(
                f"{named(present)} in {path} differ, and config.json says they are tied",
                next='set "tie_word_embeddings": false in config.json',
            )
    given = {n for group in tied if any(m in tensors for m in group) for n in group}
    assign(model.module, tensors, path, given)
    for group in tied:
        first = next(name for name in group if name in tensors)
        value = model.module.get_parameter(first)
        for name in group:
            holder, _, last = name.rpartition(".")
            setattr(model.module.get_submodule(holder), last, value)


def _weight_files(path: Path, allow_pickle: bool) -> list[Path]:
    for stem, suffix in (("model", ".safetensors"), ("pytorch_model", ".bin")):
        index, single = path / f"{stem}{suffix}.index.json", path / f"{stem}{suffix}"
        if not index.exists() and not single.exists():
            continue
        if suffix == ".bin" and not allow_pickle:
            raise InputError(
                f"the weights in {path} are a pickle",
                got=single.name,
                allowed="safetensors",
                next="convert them, or pass --allow-pickle to have them read weights-only",
            )
        if single.exists():
            return [regular(single, path)]
        return _shards(index, path, suffix)
    raise InputError(
        f"{path} has no weights", allowed="model.safetensors or model.safetensors.index.json"
    )


def _shards(index: Path, path: Path, suffix: str) -> list[Path]:
    regular(index, path)
    table = read_json(index)
    places = table.get("weight_map") if isinstance(table, dict) else None
    if not isinstance(places, dict) or not places:
        raise InputError(f"{index} has no weight_map", next="copy the index again")
    shards = set(places.values())
    for shard in shards:
        if not isinstance(shard, str) or Path(shard).name != shard or not shard.endswith(suffix):
            raise InputError(
                f"{index.name} names a shard that is no file of its folder", got=repr(shard)
            )
    files = [regular(path / shard, path) for shard in sorted(shards)]
    if suffix == ".safetensors":
        seen: dict[str, str] = {}
        for file in files:
            for name in read_names(file, path):
                if name in seen:
                    raise InputError(f"{name} is in two shards", got=f"{seen[name]}, {file.name}")
                seen[name] = file.name
        if wrong := {n for n in seen.keys() | places.keys() if seen.get(n) != places.get(n)}:
            raise InputError(f"{index.name} and its shards disagree", got=named(wrong))
    return files


def _names(files: list[Path], root: Path) -> list[str]:
    if files[0].suffix == ".bin":
        return [name for file in files for name in read_pickle(file, root)]
    return [name for file in files for name in read_names(file, root)]


def _pooling(path: Path) -> str:
    modules = path / "modules.json"
    folder = "1_Pooling"
    if modules.exists():
        listed = read_json(regular(modules, path))
        for entry in listed if isinstance(listed, list) else ():
            kind = str(entry.get("type", "")).rpartition(".")[2] if isinstance(entry, dict) else ""
            if kind not in ("Transformer", "Pooling", "Normalize"):
                raise InputError(
                    f"{modules} has a part that is not understood",
                    got=kind,
                    allowed="Transformer, Pooling, Normalize",
                )
            folder = str(entry.get("path")) if kind == "Pooling" else folder
    file = path / folder / "config.json"
    if not file.exists():
        return "mean"
    table = read_json(regular(file, path))
    if not isinstance(table, dict):
        raise InputError(f"{file} is not a JSON object", got=type(table).__name__)
    on = {k[13:] for k, v in table.items() if k.startswith("pooling_mode_") and v}
    modes = {"cls_token": "cls", "mean_tokens": "mean"}
    pooling = modes.get("".join(on), table.get("pooling_mode"))
    if pooling not in ("cls", "mean"):
        got = ", ".join(sorted(on)) or pooling
        raise InputError(f"pooling in {file}", got=got, allowed="cls, mean")
    return str(pooling)


def _renamed(module: nn.Module, tensors: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    """Checkpoint names and layouts of older transformers, as the class has them now."""
    wanted, prefix = module.state_dict(), getattr(module, "base_model_prefix", "")
    changes = get_model_conversion_mapping(module)
    renamings = [c for c in changes if isinstance(c, WeightRenaming)]
    converters = [c for c in changes if isinstance(c, WeightConverter)]
    by_pattern = {pattern: c for c in converters for pattern in c.source_patterns}
    result: dict[str, Tensor] = {}
    merging: dict[str, Any] = {}
    for name, tensor in sorted(tensors.items(), key=lambda item: _natural(item[0])):
        new, pattern = rename_source_key(name, renamings, converters, prefix or None, wanted)
        if new not in wanted and name in wanted:
            new, pattern = name, None
        if pattern is not None and new in wanted:
            converter = merging.setdefault(new, copy.deepcopy(by_pattern[pattern]))
            converter.add_tensor(new, name, pattern, tensor)
            continue
        if new in result:
            raise InputError(f"two tensors in {path} are {new}", got=name)
        result[new] = tensor
    for new, converter in merging.items():
        try:
            parts = converter.convert(new, model=module, config=module.config)
        except Exception as error:
            # The conversions stack and concatenate; a wrong shape fails deep inside.
            raise InputError(f"{new} cannot be put together from {path}", got=error) from error
        result |= {k: v[0] if isinstance(v, list) else v for k, v in parts.items()}
    return result


def _natural(name: str) -> list[tuple[int, str]]:
    return [(int(p), "") if p.isdigit() else (-1, p) for p in name.split(".")]


def _ignorable(name: str, model: Model) -> bool:
    """Buffers that the constructor computes, and the pooler that pooling by hand leaves out."""
    if name in dict(model.module.named_buffers()) or name.endswith("rotary_emb.inv_freq"):
        return True
    pooler = "pooler." in name and model.interface in ("embedding", "causal")
    prefix = getattr(model.module, "base_model_prefix", "")
    stale = name.removeprefix(f"{prefix}.").rpartition(".")[2]
    # The causal mask of GPT-2 and its kin used to be saved with the weights.
    mask = name.endswith(".attn.bias") and str(model.source.details["class"]).startswith("GPT")
    return pooler or mask or stale in ("position_ids", "masked_bias")
