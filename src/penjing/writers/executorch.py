"""Writer `executorch`: a model.pte for phones and boards, its products in XNNPACK.

One sample at a time, a text of 2 tokens to as many as the network takes. What XNNPACK has no
kernel for runs in the runtime's portable operators. A program has no names of inputs; two
methods beside `forward` tell them and the greatest length:

    input_names   "input_ids,attention_mask"
    longest       512; 0 for inputs of fixed sizes

Attention is traced as plain products and a softmax, which XNNPACK takes whole.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from penjing.errors import ExportError, UsageError
from penjing.model import Model
from penjing.silence import hushed
from penjing.writers._onnx_graph import _Flat, _uninterrupted
from penjing.writers._pte_layers import convolves, opens, place, reason

__all__ = ["check", "closed", "write"]

# Of a text where the configuration does not say.
_LONGEST = 512
_RELUS = ("relu.default", "relu_.default", "relu6.default", "hardtanh.default", "hardtanh_.default")


def check(model: Model) -> list[str]:
    """What of `model` this writer cannot express, a line each; empty when it can all."""
    if model.interface == "causal":
        return ["a decoder with a KV cache"]
    if model.interface == "weights":
        return ["a bare weight file, which has no graph"]
    lines, owners = [], _owners(model)
    for name, planes in model.planes.items():
        parameter = model.module.get_parameter(name)
        if not owners.get(id(parameter)):
            lines.append(f"{name}: not the weight of a linear, embedding or convolution layer")
        for path, layer in owners.get(id(parameter), []):
            if why := reason(planes, layer):
                lines.append(f"{name}: {why}")
            elif path not in model.activations and not opens(layer) and convolves(layer):
                lines.append(f"{name}: a {_kind(layer)} with inputs in floats")
    for path in model.activations:
        layer = model.module.get_submodule(path)
        weight = getattr(layer, "weight", None)
        own = next((p for n, p in model.planes.items() if model.module.get_parameter(n) is weight),
                   None)  # fmt: skip
        if not isinstance(layer, nn.Linear | nn.Conv1d | nn.Conv2d):
            lines.append(f"{path}: 8-bit inputs of a {type(layer).__name__}")
        elif own is None or own.signed is None:
            lines.append(f"{path}: 8-bit inputs need symmetric 8- or 7-bit weights, group 0")
    for path in model.outputs:
        found = model.activations.get(path)
        if found is None or not found.scale:
            lines.append(f"{path}: an 8-bit output of a layer without a fixed range of its inputs")
    if lines:
        return lines
    narrow = [p for p in model.activations if not opens(model.module.get_submodule(p))]
    rounded = closed(model) if narrow else frozenset()
    return [
        f"{path}.weight: a {_kind(model.module.get_submodule(path))} with 8-bit inputs whose "
        "output is not rounded by the only layer that reads it"
        for path in narrow
        if path not in rounded
    ]


def write(model: Model, path: Path) -> None:
    """Write `model` to the file `path`.

    Raises:
        UsageError: ExecuTorch is not installed, or there is no kernel for a weight, by its name;
            before any work.
        ExportError: the network cannot be traced or lowered.
    """
    require()
    if lines := check(model):
        raise UsageError(
            f"ExecuTorch cannot express {lines[0]}",
            got=f"{len(lines)} such" if len(lines) > 1 else None,
            allowed="encoders and image networks; 8 or 7 bits, symmetric, a scale a row"
            if model.planes else "encoders and image networks",
            next="export --to onnx, or load the artifact in Python",
        )  # fmt: skip
    fixed = any(found.scale for found in model.activations.values())
    program = _traced(model, closed(model) if fixed else frozenset())
    with _uninterrupted(), hushed(), torch.no_grad(), _failing("lowered to ExecuTorch"):
        from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
        from executorch.exir import to_edge_transform_and_lower

        edge = to_edge_transform_and_lower(
            program,
            partitioner=[XnnpackPartitioner()],
            constant_methods={
                "input_names": ",".join(model.example),
                "longest": _longest(model) if _is_text(model) else 0,
            },
        )
        edge.to_executorch().save(str(path))


def require() -> None:
    """Import what lowers a network.

    Raises:
        UsageError: it is not installed.
    """
    try:
        with hushed():
            import executorch.backends.xnnpack.partition.xnnpack_partitioner
            import executorch.exir  # noqa: F401
    except ImportError as error:
        raise UsageError(
            "ExecuTorch cannot be imported", got=error, next="pip install 'penjing[edge]'"
        ) from error


def closed(model: Model) -> frozenset[str]:
    """Layers with fixed input ranges whose output is rounded to one, behind a ReLU or none."""
    fixed = {path for path, found in model.activations.items() if found.scale}
    program = _traced(model, fixed)
    codes = {
        node: program.graph_signature.inputs_to_buffers[node.name]
        for node in program.graph.nodes
        if node.op == "placeholder" and node.name in program.graph_signature.inputs_to_buffers
    }
    found: dict[str, bool] = {}
    for node in program.graph.nodes:
        if _operator(node) != "dequantize_per_channel.default":
            continue
        path = codes[node.args[0]].removeprefix("module.").removesuffix("codes").rstrip(".")
        for product in node.users:
            # A layer that is called twice is closed where both of its outputs are.
            found[path] = found.get(path, True) and _is_rounded(product)
    return frozenset(path for path, every in found.items() if every and path in fixed)


def _is_rounded(product: torch.fx.Node) -> bool:
    users = list(product.users)
    if len(users) == 1 and _operator(users[0]) in _RELUS:
        users = list(users[0].users)
    return len(users) == 1 and _operator(users[0]) == "quantize_per_tensor.default"


def _operator(node: torch.fx.Node) -> str:
    return getattr(node.target, "__name__", "") if node.op == "call_function" else ""


def _traced(model: Model, closed: frozenset[str] | set[str]) -> Any:
    """The exported program of one sample, integers and rounding in it."""
    twin = model.copy(shared=True)
    place(twin, closed)
    with contextlib.suppress(AttributeError):
        twin.module.set_attn_implementation("eager")  # type: ignore[operator]
    twin.module.eval().requires_grad_(False)
    inputs, shapes = _inputs(model)
    with _uninterrupted(), hushed(), torch.no_grad(), _failing("traced"):
        return torch.export.export(_Flat(twin), inputs, dynamic_shapes=(shapes,))


def _inputs(model: Model) -> tuple[tuple[Tensor, ...], tuple[Any, ...]]:
    """One sample, and which of its sizes are free."""
    samples = [x[:1] for x in model.example.values()]
    if not _is_text(model):
        return tuple(x.contiguous() for x in samples), tuple(None for _ in samples)
    # A size of 1 would be taken for a fixed one.
    samples = [torch.cat([x, x], 1)[:, : max(2, min(16, x.shape[1]))] for x in samples]
    length = torch.export.Dim("length", min=2, max=_longest(model))
    return tuple(x.contiguous() for x in samples), tuple({1: length} for _ in samples)


def _is_text(model: Model) -> bool:
    return "input_ids" in model.example and model.interface in ("embedding", "classifier")


def _longest(model: Model) -> int:
    return model.longest or _LONGEST


def _owners(model: Model) -> dict[int, list[tuple[str, nn.Module]]]:
    """Layers by the identity of their weight."""
    found: dict[int, list[tuple[str, nn.Module]]] = {}
    for path, layer in model.module.named_modules():
        if isinstance(layer, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Embedding):
            found.setdefault(id(layer.weight), []).append((path, layer))
    return found


def _kind(layer: nn.Module) -> str:
    grouped = "grouped " if getattr(layer, "groups", 1) > 1 else ""
    return f"{grouped}{type(layer).__name__}"


@contextlib.contextmanager
def _failing(what: str) -> Iterator[None]:
    """Any failure of the tracer or of the lowering, in a sentence."""
    try:
        yield
    except Exception as error:
        lines = str(error.__cause__ or error).strip().splitlines() or [""]
        raise ExportError(
            f"the network cannot be {what}", got=f"{type(error).__name__}: {lines[0]}",
            next="export --to onnx",
        ) from error  # fmt: skip
