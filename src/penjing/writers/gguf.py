"""Writer `gguf`: a decoder of the llama family that came from a GGUF file, as model.gguf.

The keys of the source (tokenizer, context, rotary base) are carried over and those of the shape
set anew.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf

from penjing.errors import ExportError
from penjing.files import fingerprint, whole_file
from penjing.ggufnames import interleaved, name_of
from penjing.model import Model
from penjing.writers._gguf_blocks import blocks, kind_of, plain, problem

__all__ = ["check", "file", "write"]

file = "model.gguf"
"""Name of the exported file in an artifact."""

# Files by the type of most of their weights, as llama.cpp numbers them.
_FILE_TYPES = {"F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "Q5_0": 8, "Q5_1": 9}


def check(model: Model) -> list[str]:
    """What of `model` this writer cannot express, a line each; empty when it can all."""
    if model.source.kind != "gguf":
        return [f"a {model.source.kind} model: the tokenizer is carried over from a GGUF file"]
    origin = _origin(model)
    if not origin.is_file() or fingerprint([origin]) != model.source.fingerprint:
        return [f"the model without its source {origin} as it was, whose tokenizer it needs"]
    lines = [f"{name}: not a tensor of llama" for name in model.state() if not name_of(name)]
    lines += [f"{path}: 8-bit inputs" for path in model.activations]
    lines += [f"{path}: a KV cache in integers" for path in model.cache]
    for name, planes in model.planes.items():
        if reason := problem(planes):
            lines.append(f"{name}: {reason}")
    if not lines:
        try:
            _sizes(model)
        except ExportError as error:
            lines.append(error.what)
    return lines


def write(model: Model, path: Path) -> None:
    """Write `model` to the new file `path`, whole or not at all.

    Raises:
        ExportError: what GGUF's integer types cannot express; before any work.
        InputError: the file exists or cannot be written.
    """
    if lines := check(model):
        raise ExportError(
            f"GGUF cannot express {lines[0]}",
            got=f"{len(lines)} such" if len(lines) > 1 else None,
            allowed="models read from GGUF; 4 or 5 bits, or 8 bits symmetric, groups of multiples "
            "of 32, layer inputs in floats, layers of one shape",
            next="quantize with bits = 4, group = 32, scale_bits = 16, or export to onnx",
        )
    whole_file(path, lambda beside: _write(model, beside))


def _write(model: Model, path: Path) -> None:
    writer = gguf.GGUFWriter(path, "llama")
    counts: dict[str, int] = {}
    quantized, width = _quantized(model), _sizes(model)["attention.key_length"]
    for name, value in model.state().items():
        rows = interleaved(name, len(value), width)
        if name in quantized:
            planes = quantized[name]
            kind, data = kind_of(planes), blocks(planes, rows)
        else:
            data, kind = plain(value if rows is None else value[rows])
        writer.add_tensor(name_of(name), data, raw_dtype=kind)
        counts[kind.name] = counts.get(kind.name, 0) + value.numel()
    _keys(model, writer, _FILE_TYPES[max(counts, key=lambda kind: counts[kind])])
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()


def _keys(model: Model, writer: Any, file_type: int) -> None:
    """The source's keys, with those that edits have changed."""
    own = {f"llama.{name}": value for name, value in _sizes(model).items()}
    own |= {"general.file_type": file_type, "general.quantization_version": 2}
    for name, value in own.items():
        writer.add_uint32(name, value)
    for field in gguf.GGUFReader(_origin(model)).fields.values():
        left_out = ("GGUF.", "split.", "general.architecture", "general.alignment")
        if field.name in own or field.name.startswith(left_out):
            continue
        inner = field.types[-1] if len(field.types) > 1 else None
        writer.add_key_value(field.name, field.contents(), field.types[0], inner)


def _sizes(model: Model) -> dict[str, int]:
    """Keys of the shape, which all layers must share."""
    module: Any = model.module
    found = {
        (m.self_attn.q_proj.out_features, m.self_attn.k_proj.out_features,
         m.self_attn.head_dim, m.mlp.up_proj.out_features)
        for m in module.model.layers
    }  # fmt: skip
    if len(found) != 1:
        raise ExportError("layers of several shapes")
    [(queries, keys, width, hidden)] = found
    return {
        "block_count": len(module.model.layers), "feed_forward_length": hidden,
        "attention.head_count": queries // width, "attention.head_count_kv": keys // width,
        "attention.key_length": width, "attention.value_length": width,
    }  # fmt: skip


def _quantized(model: Model) -> dict[str, Any]:
    """Planes by the name `Model.state` has for them."""
    first = {name: group[0] for group in model.tied() for name in group}
    return {first.get(name, name): planes for name, planes in model.planes.items()}


def _origin(model: Model) -> Path:
    return Path(str(model.source.details.get("location", model.source.path)))
