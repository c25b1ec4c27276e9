"""Writer `compressed-tensors`: a Hugging Face folder that transformers and vLLM read.

    config.json         the network's, with `quantization_config`
    model.safetensors   linear layers in integers, see `_compressed`; everything else in float32
    the rest            tokenizer and preprocessing files of the source

Embedding tables, and heads tied to one, are written as the floats they stand for.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from penjing.errors import ExportError
from penjing.files import read_json, whole_folder, write_json
from penjing.graph import Transposed
from penjing.model import Model
from penjing.writers._compressed import Layout, dequantized, layout, problem, stored

__all__ = ["check", "file", "tensors", "write"]

file = "compressed-tensors"
"""Name of the exported folder in an artifact."""

_WEIGHTS = "model.safetensors"


def check(model: Model) -> list[str]:
    """What of `model` this writer cannot express, a line each; empty when it can all."""
    if "config" not in model.source.details or not hasattr(model.module, "config"):
        return [f"a {model.source.kind} model: only networks of transformers have a config.json"]
    lines = []
    for name, planes in model.planes.items():
        module = model.module.get_submodule(name.rpartition(".")[0])
        if isinstance(module, nn.Embedding):
            continue
        if not isinstance(module, nn.Linear) or not name.endswith(".weight"):
            lines.append(f"{name}: not the weight of a linear or embedding layer")
            continue
        reason = problem(planes, inputs=name.removesuffix(".weight") in model.activations)
        if reason:
            lines.append(f"{name}: {reason}")
    lines += [
        f"{path}: its matrix is transposed in a checkpoint"
        for path, module in model.module.named_modules()
        if isinstance(module, Transposed)
    ]
    for path, found in model.activations.items():
        if f"{path}.weight" not in model.planes:
            lines.append(f"{path}: 8-bit inputs of a layer without integer weights of its own")
        elif found.scale or found.channels is not None:
            lines.append(f"{path}: a fixed range of its inputs, or one with factors by channel")
    lines += [f"{path}: 8-bit outputs" for path in model.outputs]
    lines += [f"{path}: a KV cache in integers" for path in model.cache]
    return lines or _unlike(model)


def _unquantized(model: Model) -> list[str]:
    """A line where there is nothing to store in integers; before the work there never is."""
    if _layouts(model):
        return []
    # Its sparse layouts are read no longer: the weights would be filled with random numbers.
    sparse = ", and sparse ones have no layout that is still read" if model.masks else ""
    return [f"the network: no linear layer is quantized{sparse}"]


def write(model: Model, folder: Path) -> None:
    """Write `model` to the new folder `folder`, whole or not at all.

    Raises:
        ExportError: what the layout cannot express; before any work.
        InputError: the folder exists or cannot be written.
    """
    if lines := check(model) or _unquantized(model):
        raise ExportError(
            f"compressed-tensors cannot express {lines[0]}",
            got=f"{len(lines)} such" if len(lines) > 1 else None,
            allowed="linear layers in one plane of 2 to 8 bits with whole zero points, groups that "
            "divide the row; 8-bit inputs with ranges found at run time",
            next="quantize with codes = integer, or export to onnx",
        )
    forms = _layouts(model)
    found: dict[str, Tensor] = {}
    for name, value in model.state().items():
        path = name.rpartition(".")[0]
        if path in forms and name == f"{path}.weight":
            parts = stored(model.planes[name], forms[path])
            found |= {f"{path}.{part}": tensor for part, tensor in parts.items()}
        else:
            found[name] = value.detach().cpu().contiguous()
    with whole_folder(folder) as beside:
        for asset in model.source.assets:
            shutil.copyfile(asset, beside / asset.name)
        if not model.source.assets and model.tokenizer is not None:
            model.tokenizer.save_pretrained(str(beside))
        save_file(found, beside / _WEIGHTS, metadata={"format": "pt"})
        config = _config(model) | {"quantization_config": _groups(model, forms)}
        write_json(beside / "config.json", config)


def tensors(folder: Path) -> dict[str, Tensor]:
    """Every weight in a folder of `write`, by the network's own names, float32.

    Raises:
        InputError: config.json cannot be read.
    """
    groups = read_json(folder / "config.json")["quantization_config"]["config_groups"].values()
    weights = {path: group["weights"] for group in groups for path in group["targets"]}
    found: dict[str, Tensor] = load_file(folder / _WEIGHTS)
    for path, scheme in weights.items():
        own = {n: found.pop(n) for n in list(found) if n.startswith(f"{path}.weight")}
        parts = {name.rpartition(".")[2]: tensor for name, tensor in own.items()}
        found[f"{path}.weight"] = dequantized(parts, scheme)
    return found


def _layouts(model: Model) -> dict[str, Layout]:
    """Layout by path of each linear layer that is stored in integers."""
    found = {}
    for name, planes in model.planes.items():
        path = name.rpartition(".")[0]
        if isinstance(model.module.get_submodule(path), nn.Linear):
            found[path] = layout(planes, inputs=path in model.activations)
    return found


def _groups(model: Model, forms: dict[str, Layout]) -> dict[str, Any]:
    by_form: dict[Layout, list[str]] = {}
    for path, form in forms.items():
        by_form.setdefault(form, []).append(path)
    groups = [form.to_json(paths) for form, paths in by_form.items()]
    formats = {group["format"] for group in groups}
    linear = [p for p, m in model.module.named_modules() if isinstance(m, nn.Linear)]
    return {
        "quant_method": "compressed-tensors", "quantization_status": "compressed",
        "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "config_groups": {f"group_{k}": group for k, group in enumerate(groups)},
        "ignore": [path for path in linear if path not in forms],
    }  # fmt: skip


def _config(model: Model) -> dict[str, Any]:
    settings: Any = model.module.config
    named = {"architectures": [model.source.details["class"]], "dtype": "float32"}
    return {**settings.to_diff_dict(), "model_type": settings.model_type, **named}


def _unlike(model: Model) -> list[str]:
    """Where a network built from the configuration has other weights than `model`."""
    module: Any = model.module
    with torch.device("meta"):
        again = type(module)(type(module.config).from_dict(_config(model)))
    wanted = {n: tuple(t.shape) for n, t in again.state_dict().items() if "pooler." not in n}
    own = {n: tuple(t.shape) for n, t in model.module.state_dict().items() if "pooler." not in n}
    unlike = sorted(n for n in wanted.keys() | own.keys() if wanted.get(n) != own.get(n))
    return [f"{name}: config.json has no word for its shape" for name in unlike]
