"""Writer `onnx`: one model.onnx of opset 23, quantized weights stored in their own bits.

The float graph is traced once; then every quantized parameter is found in it by content and
its reader replaced, see `_onnx_integer` (8-bit inputs) and `_onnx_blocks` (weights only).
"""

from __future__ import annotations

from pathlib import Path

import onnx
from torch import nn

from penjing.errors import ExportError, UsageError
from penjing.model import Model
from penjing.writers._onnx_attention import flatten_attention, repeat_rotary
from penjing.writers._onnx_blocks import place, problem
from penjing.writers._onnx_cache import place_cache
from penjing.writers._onnx_edit import Graph
from penjing.writers._onnx_fused import fuse_attention
from penjing.writers._onnx_graph import float_graph, projected, turn_constants
from penjing.writers._onnx_integer import Layer, place_kernels, place_matrices
from penjing.writers._onnx_uses import Use, find_uses

__all__ = ["Use", "check", "file", "find_uses", "float_graph", "quantized_graph", "write"]

file = "model.onnx"
"""Name of the exported file in an artifact."""

_INLINE_LIMIT = 1_800_000_000  # bytes; a protobuf file ends at 2 GiB
_KINDS: dict[type[nn.Module], str] = {
    nn.Linear: "MatMul", nn.Embedding: "Gather",
    nn.Conv1d: "Conv", nn.Conv2d: "Conv", nn.Conv3d: "Conv",
}  # fmt: skip


def check(model: Model) -> list[str]:
    """What of `model` this writer cannot express, a line each; empty when it can all."""
    lines = []
    owners = {id(m.weight): (path, m) for path, m in _layers(model)}
    for name, planes in model.planes.items():
        parameter = model.module.get_parameter(name)
        if id(parameter) not in owners:
            lines.append(f"{name}: not the weight of a linear, embedding or convolution layer")
            continue
        reason = problem(planes, _kind(owners[id(parameter)][1]))
        if reason:
            lines.append(f"{name}: {reason}")
    for path in model.activations:
        layer = model.module.get_submodule(path)
        own = model.planes.get(_canonical(model, f"{path}.weight".lstrip(".")) or "")
        if not isinstance(layer, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)):
            lines.append(f"{path}: 8-bit inputs of a {type(layer).__name__}")
        elif own is None or own.signed is None or own.rotation is not None:
            needed = "symmetric 8- or 7-bit weights, group 0, not rotated"
            lines.append(f"{path}: 8-bit inputs need {needed}")
    lines += [f"{path}: 8-bit queries or keys" for path in model.outputs]
    for path, grid in model.cache.items():
        if grid.key_scale.shape[1] % 8 or grid.key_scale.shape != grid.value_scale.shape:
            lines.append(f"{path}: a KV cache in integers of heads that are no multiple of 8 wide")
    return lines + projected(model)


def write(model: Model, path: Path) -> None:
    """Write `model` to the file `path`.

    Raises:
        UsageError: a scheme that onnxruntime has no operator for; before any work.
        ExportError: the network cannot be traced, or the graph is not valid ONNX.
    """
    proto = quantized_graph(model)
    large = proto.ByteSize() > _INLINE_LIMIT
    if large:
        onnx.save(proto, path, save_as_external_data=True, location=f"{path.name}.data")
    else:
        onnx.save(proto, path)
    try:
        onnx.checker.check_model(str(path) if large else proto)
    except onnx.checker.ValidationError as error:
        raise ExportError("the exported graph is not valid ONNX", got=error) from error


def quantized_graph(model: Model) -> onnx.ModelProto:
    """The graph that `write` writes."""
    if lines := check(model):
        raise UsageError(
            f"ONNX cannot express {lines[0]}",
            got=f"{len(lines)} such" if len(lines) > 1 else None,
            allowed="codes of one weight each, in groups of multiples of 16 or the whole row"
            if model.planes else None,
            next=f"{'quantize with another scheme, or ' if model.planes else ''}load the artifact "
            "in Python: it runs all",
        )  # fmt: skip
    proto = float_graph(model)
    turned = turn_constants(proto)
    uses = find_uses(proto, model)
    graph = Graph(proto)
    matrices, kernels = [], []
    for name, planes in model.planes.items():
        rest = []
        for use in uses.get(name, []):
            found = model.activations.get(use.module)
            if found is None:
                rest.append(use)
            elif use.node.op_type == "Conv":
                kernels.append(Layer(name, use, planes, found))
            else:
                matrices.append(Layer(name, use, planes, found))
        place(graph, name, planes, rest)
    place_matrices(graph, matrices)
    place_kernels(graph, kernels)
    for node in turned:
        if graph.readers(node.input[0]) and graph.readers(node.output[0]):
            graph.nodes.insert(0, node)
            del graph.constants[node.output[0]]
    place_cache(graph, model)
    repeat_rotary(graph)
    flatten_attention(graph)
    fuse_attention(graph)
    _unfuse_residuals(graph)
    return graph.finish()


def _unfuse_residuals(graph: Graph) -> None:
    """Write residual additions in front of a LayerNormalization as Sum.

    onnxruntime fuses Add and LayerNormalization to SkipLayerNormalization, whose CPU kernel
    took 118 us at [1, 128, 384] against 37 us for the two apart.
    """
    normalized = {n.input[0] for n in graph.nodes if n.op_type == "LayerNormalization"}
    for node in graph.nodes:
        constant = any(name in graph.constants for name in node.input)
        if node.op_type == "Add" and node.output[0] in normalized and not constant:
            node.op_type = "Sum"


def _layers(model: Model) -> list[tuple[str, nn.Module]]:
    return [(p, m) for p, m in model.module.named_modules() if _kind(m)]


def _kind(module: nn.Module) -> str:
    """Operator of a layer; many networks subclass the plain ones."""
    return next((op for kind, op in _KINDS.items() if isinstance(module, kind)), "")


def _canonical(model: Model, name: str) -> str | None:
    parameter = dict(model.module.named_parameters(remove_duplicate=False)).get(name)
    return next((n for n, p in model.parameters() if p is parameter), None)
