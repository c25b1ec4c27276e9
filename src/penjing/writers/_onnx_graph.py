"""The float ONNX graph of a model: `Model.run` traced by torch.export, opset 23.

Encoders and classifiers: the keys of `model.example` -> `output`, batch and length free.
Decoders: input_ids [batch, new], attention_mask [batch, past + new] and, for each layer i,
past_key_values.{i}.key and .value [batch, kv heads, past, head width] -> `output`
[batch, new, vocabulary] and present.{i}.key and .value [batch, kv heads, past + new, width].
"""

from __future__ import annotations

import collections
import contextlib
import hashlib
import signal
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import torch
from onnx import numpy_helper
from torch import Tensor, nn

from penjing.errors import ExportError, UsageError
from penjing.model import Model, Source
from penjing.silence import hushed

__all__ = ["OPSET", "float_graph", "projected"]

OPSET = 23


def projected(model: Model) -> list[str]:
    """LSTMs with a projection, a line each: the operator has none.

    torch's exporter writes a graph all the same, which does not run.
    """
    return [
        f"{path}: an LSTM with proj_size" for path, layer in model.module.named_modules()
        if isinstance(layer, nn.LSTM) and layer.proj_size
    ]  # fmt: skip


class _Flat(nn.Module):
    """`Model.run` with positional tensors."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.module = model.module
        self._run = model.run
        self._names = tuple(model.example)

    def forward(self, *inputs: Tensor) -> Tensor:
        return self._run(dict(zip(self._names, inputs, strict=True)))


class _Cached(nn.Module):
    """A causal model with its cache as flat inputs and outputs."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, *past: Tensor
    ) -> tuple[Tensor, ...]:
        from transformers import DynamicCache

        cache = DynamicCache(list(zip(past[::2], past[1::2], strict=True)))
        batch, new = input_ids.shape
        positions = torch.arange(new) + past[0].shape[2]  # [new]
        output = self.module(
            input_ids=input_ids,
            attention_mask=attention_mask,
            # onnxruntime's rotary embedding wants a row for every sample.
            position_ids=positions.unsqueeze(0).expand(batch, new),
            past_key_values=cache,
            use_cache=True,
        )
        present = [t for layer in output.past_key_values.layers for t in (layer.keys, layer.values)]
        return (output.logits.float(), *present)


@dataclass
class _Trace:
    """A graph without its weights, and where they go.

    Attributes:
        facts: `_facts` of the model that was traced.
        source: of that model; its copies share it.
        proto: every initializer of `weights` is empty.
        weights: for an initializer the tensors it holds, and whether each is turned. The tracer
            merges equal ones; the graph serves as long as they stay equal.
    """

    facts: tuple[Any, ...]
    source: Source
    proto: onnx.ModelProto
    weights: dict[str, list[tuple[str, bool]]]


# The last ones: edits that change numbers alone do not change the graph, and tracing takes longer
# than all the rest of an export. A fit goes to and fro between a few sets of blocks.
_kept: collections.deque[_Trace] = collections.deque(maxlen=8)


def float_graph(model: Model) -> onnx.ModelProto:
    """The model in float32, weights dequantized, activation ranges ignored.

    Raises: as `_traced`.
    """
    facts = _facts(model)
    for trace in _kept:
        same = trace.source is model.source and trace.facts == facts
        if same and (filled := _filled(trace, model)) is not None:
            return filled
    proto = _traced(model)
    if (weights := _weights(proto, model)) is not None:
        bare = onnx.ModelProto()
        bare.CopyFrom(proto)
        for tensor in bare.graph.initializer:
            if tensor.name in weights:
                tensor.ClearField("raw_data")
        _kept.append(_Trace(facts, model.source, bare, weights))
    return proto


def _facts(model: Model) -> tuple[Any, ...]:
    """All of a model, of one source, that its graph depends on; but no weight."""
    config = getattr(model.module, "config", None)
    return (
        model.interface,
        repr(config),
        getattr(config, "_attn_implementation", None),  # it is not in what is printed
        repr(model.structure),
        tuple((n, tuple(x.shape)) for n, x in model.example.items()),
        tuple(
            # What is one number throughout, the tracer may leave out (a bias of zeros), compute
            # with or merge with a constant of the network.
            (n, tuple(t.shape), t.dtype, _digest(_array(t)) if _uniform(t) else b"")
            for n, t in _parameters(model).items()
        ),
        # A buffer is no weight: rotary tables and the like are the graph's own.
        tuple((n, _digest(_array(t))) for n, t in model.module.named_buffers()),
        model.tied(),
        tuple(
            (
                name,
                type(m),
                m.extra_repr(),
                # The hooks of ranges are not traced.
                0 if name in model.outputs else len(m._forward_hooks),
                0 if name in model.activations else len(m._forward_pre_hooks),
            )
            for name, m in model.module.named_modules()
        ),
    )


def _parameters(model: Model) -> dict[str, Tensor]:
    named = model.module.named_parameters(remove_duplicate=False)
    return {name: tensor.detach() for name, tensor in named}


def _uniform(tensor: Tensor) -> bool:
    return tensor.numel() < 2 or bool((tensor == tensor.flatten()[0]).all())


def _tensors(model: Model) -> dict[str, Tensor]:
    return _parameters(model) | dict(model.module.named_buffers())


def _weights(proto: onnx.ModelProto, model: Model) -> dict[str, list[tuple[str, bool]]] | None:
    """Which tensors each float initializer is; None where it is another one's product."""
    places: dict[bytes, list[tuple[str, bool]]] = {}
    again = {name for group in model.tied() for name in group[1:]}
    for name, tensor in _tensors(model).items():
        if name not in again:
            array = _array(tensor)
            places.setdefault(_digest(array), []).append((name, False))
            if array.ndim == 2:
                places.setdefault(_digest(array.T), []).append((name, True))
    found = {}
    for stored in proto.graph.initializer:
        array = numpy_helper.to_array(stored)
        if array.size < 2 or array.dtype.kind != "f":
            continue
        match = places.get(_digest(array))
        if match is None or not stored.HasField("raw_data"):
            return None
        found[stored.name] = match
    return found


def _array(tensor: Tensor) -> np.ndarray:
    tensor = tensor.float() if tensor.dtype == torch.bfloat16 else tensor  # numpy has none
    return tensor.cpu().contiguous().numpy()


def _digest(array: np.ndarray) -> bytes:
    return hashlib.sha256(f"{array.shape} {array.dtype}".encode() + array.tobytes()).digest()


def _filled(trace: _Trace, model: Model) -> onnx.ModelProto | None:
    """None where what the tracer merged is equal no more."""
    proto = onnx.ModelProto()
    proto.CopyFrom(trace.proto)
    tensors = _tensors(model)
    for stored in proto.graph.initializer:
        if stored.name in trace.weights:
            first, *rest = (
                _array(tensors[name].T if turned else tensors[name]).tobytes()
                for name, turned in trace.weights[stored.name]
            )
            if any(other != first for other in rest):
                return None
            stored.raw_data = first
    return proto


def _traced(model: Model) -> onnx.ModelProto:
    """`float_graph`, made anew.

    Raises:
        UsageError: a bare weight file.
        ExportError: torch.export cannot trace the module.
    """
    if model.interface == "weights":
        raise UsageError("a bare weight file has no graph", next="give a model, not its weights")
    if model.interface == "causal":
        wrapper, inputs, names, outputs, shapes = _cached(model)
    else:
        wrapper = _Flat(model)
        inputs = tuple(_doubled(model, name) for name in model.example)
        names, outputs = list(model.example), ["output"]
        axes = {0: "batch"} if model.interface in ("image", "tensor") or model.is_image else None
        shapes = (tuple(axes or {0: "batch", 1: "length"} for _ in names),)
    with _uninterrupted(), _without_fake_quantization(model), hushed(), torch.no_grad():
        try:
            program = torch.onnx.export(
                wrapper,
                inputs,
                dynamo=True,
                opset_version=OPSET,
                input_names=names,
                output_names=outputs,
                dynamic_shapes=shapes,
                verbose=False,
            )
        except Exception as error:
            reason = str(error.__cause__ or error).strip().splitlines() or [""]
            raise ExportError(
                "the network cannot be traced to ONNX",
                got=f"{type(error).__name__}: {reason[0]}",
                next="make its forward free of Python control flow that depends on tensor values",
            ) from error
    if program is None:
        raise ExportError("the network cannot be traced to ONNX")
    return _plain(program.model_proto)


def turn_constants(proto: onnx.ModelProto) -> list[onnx.NodeProto]:
    """Replace every Transpose of a constant matrix by the turned constant; give the nodes taken.

    The tracer leaves one where the matrix has another reader, as a tied table has; the weight of
    a matrix product must be a constant to be found. What nobody rewrote is to be put back: the
    copy doubles the bytes of the table.
    """
    stored = {t.name: t for t in proto.graph.initializer if len(t.dims) == 2}
    kept, taken = [], []
    for node in list(proto.graph.node):
        if node.op_type == "Transpose" and node.input[0] in stored:
            array = numpy_helper.to_array(stored[node.input[0]]).T
            turned = numpy_helper.from_array(np.ascontiguousarray(array), node.output[0])
            proto.graph.initializer.append(turned)
            twin = onnx.NodeProto()
            twin.CopyFrom(node)
            taken.append(twin)
        else:
            kept.append(node)
    del proto.graph.node[:]
    proto.graph.node.extend(kept)
    return taken


def _doubled(model: Model, name: str) -> Tensor:
    """The example with at least two samples and two tokens: torch.export fixes a size of 1."""
    x = model.example[name]
    x = torch.cat([x, x]) if x.shape[0] < 2 else x
    if name in ("input_ids", "attention_mask", "token_type_ids"):
        x = torch.cat([x, x], dim=1) if x.shape[1] < 2 else x[:, :16]
    return x.contiguous()


def _cached(model: Model) -> tuple[nn.Module, tuple[Tensor, ...], list[str], list[str], Any]:
    ids = _doubled(model, "input_ids")
    batch, new = ids.shape
    with torch.no_grad():
        cache = model.module(input_ids=ids, use_cache=True).past_key_values
    layers = [c for c in cache.layers if c.keys is not None]  # some attentions may be gone
    past = [t[:, :, :3] if t.shape[2] > 3 else t for c in layers for t in (c.keys, c.values)]
    size = past[0].shape[2]
    names = ["input_ids", "attention_mask"]
    outputs = ["output"]
    for i in range(len(layers)):
        names += [f"past_key_values.{i}.key", f"past_key_values.{i}.value"]
        outputs += [f"present.{i}.key", f"present.{i}.value"]
    shapes = (
        {0: "batch", 1: "length"},
        {0: "batch", 1: "total"},
        tuple({0: "batch", 2: "past"} for _ in past),
    )
    mask = torch.ones(batch, size + new, dtype=torch.int64)
    inputs = (ids, mask, *(t.contiguous() for t in past))
    return _Cached(model.module), inputs, names, outputs, shapes


@contextlib.contextmanager
def _without_fake_quantization(model: Model) -> Iterator[None]:
    """Take the hooks off the modules that have a range, and put them back."""
    find = model.module.get_submodule
    own = [find(path)._forward_pre_hooks for path in model.activations]
    own += [find(path)._forward_hooks for path in model.outputs]
    held = [(hooks, hooks.copy()) for hooks in own]
    for hooks in own:
        hooks.clear()
    try:
        yield
    finally:
        for hooks, before in held:
            hooks.update(before)


@contextlib.contextmanager
def _uninterrupted() -> Iterator[None]:
    """Hold Ctrl-C and SIGTERM back to the end of the body; a second one is let through.

    An exception that a handler raises amid the tracer goes through torch's dispatcher, which loses
    it or ends the process ("trying to set the current mode, but one already exists").
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    held: list[int] = []
    were = {kind: signal.getsignal(kind) for kind in (signal.SIGINT, signal.SIGTERM)}
    own = {kind: was for kind, was in were.items() if callable(was)}

    def hold(number: int, _: object) -> None:
        held.append(number)
        for kind, was in own.items():
            signal.signal(kind, was)

    for kind in own:
        signal.signal(kind, hold)
    try:
        yield
    finally:
        for kind, was in own.items():
            signal.signal(kind, was)
        for number in held:
            signal.raise_signal(number)


def _plain(proto: onnx.ModelProto) -> onnx.ModelProto:
    """Keep of the tracer's notes only the module each node came from; paths of files go."""
    for node in proto.graph.node:
        scope = ""
        for note in node.metadata_props:
            if note.key == "pkg.torch.onnx.name_scopes":
                names = [n.strip(" '\"") for n in note.value.strip("[]").split(",")]
                scope = next((n for n in reversed(names) if n.startswith("module.")), "")
        del node.metadata_props[:]
        if scope:
            node.metadata_props.add(key="module", value=scope.removeprefix("module."))
        node.doc_string = ""
    del proto.graph.metadata_props[:]
    for value in (*proto.graph.value_info, *proto.graph.input, *proto.graph.output):
        del value.metadata_props[:]
    for tensor in proto.graph.initializer:
        del tensor.metadata_props[:]
    return proto
