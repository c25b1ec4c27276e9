"""A decoder's keys and values as integers: onnxruntime's GroupQueryAttention keeps and reads them.

The traced graph concatenates the cache with the new keys, repeats them for every query head and
attends. One operator does all of it, on int8 or packed int4 (two channels a byte, the even one
low, code + 8), symmetric with a scale a channel. The offsets of `penjing.cache` go off the new
keys and values in front of it; those of the values come back on its output.

The operator takes several new tokens after a past for a batch of one only.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper

from penjing.cache import CacheGrid, attention_layers
from penjing.errors import ExportError
from penjing.model import Model
from penjing.writers._onnx_attention import after_turn, before_turn, shapes_of
from penjing.writers._onnx_edit import Graph

__all__ = ["place_cache"]

# Far below any score, and finite: a row that sees nothing is no NaN.
_NEVER = -1e30
_MICROSOFT = "com.microsoft"


def place_cache(graph: Graph, model: Model) -> None:
    """Let every attention that has a grid in `model.cache` keep integers.

    Raises:
        ExportError: an attention that does not read its cache in the usual way.
    """
    if not model.cache:
        return
    shapes = shapes_of(graph)
    lengths = _lengths(graph)
    biases: dict[str, str] = {}
    for index, path in attention_layers(model.module).items():
        if (grid := model.cache.get(path)) is not None:
            _place(graph, index, path, grid, shapes, lengths, biases)


def _place(
    graph: Graph,
    index: int,
    path: str,
    grid: CacheGrid,
    shapes: dict[str, list[int]],
    lengths: list[str],
    biases: dict[str, str],
) -> None:
    found = _parts(graph, index)
    if found is None:
        raise ExportError(
            f"the KV cache of {path} is not read by one attention alone",
            next="leave the cache in floats",
        )
    node, joined = found
    keys, values = (_flat(graph, j.input[1], shapes, j) for j in joined)
    query = _flat(graph, node.input[0], shapes, node)
    end = after_turn(graph, node, shapes)
    heads, groups = shapes[node.input[0]][1], len(grid.key_scale)
    bias = _bias(graph, node, biases) if len(node.input) > 3 else ""
    before = [
        _shifted(graph, "Sub", name, offset.numpy().reshape(-1))
        for name, offset in ((keys, grid.key_offset), (values, grid.value_offset))
    ]
    scales = [
        graph.constant(f"cache.{index}.{part}_scale", scale.unsqueeze(1).numpy())
        for part, scale in (("key", grid.key_scale), ("value", grid.value_scale))
    ]
    attributes: dict[str, Any] = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    scale = attributes.get("scale") or 1 / math.sqrt(grid.key_scale.shape[1])
    softcap = {"softcap": attributes["softcap"]} if attributes.get("softcap") else {}
    made = graph.name("attended")
    kept = [f"present.{index}.key", f"present.{index}.value"]
    for old in joined:
        old.output[0] = graph.name("dead")
    attention = graph.node(
        "GroupQueryAttention",
        [query, before[0].output[0], before[1].output[0],
         f"past_key_values.{index}.key", f"past_key_values.{index}.value", *lengths,
         "", "", "", bias, "", *scales],
        [made, *kept],
        _MICROSOFT,
        num_heads=heads, kv_num_heads=groups, scale=scale, k_quant_type="PER_CHANNEL",
        v_quant_type="PER_CHANNEL", kv_cache_bit_width=grid.bits, **softcap,
    )  # fmt: skip
    offset = grid.value_offset.repeat_interleave(heads // groups, 0)  # [heads, width]
    after = _shifted(graph, "Add", made, offset.numpy().reshape(-1))
    if end is not None:
        after.output[0], end.output[0] = end.output[0], graph.name("dead")
        back = []
    else:
        split, shape = graph.name("split"), np.array([0, 0, heads, -1], np.int64)
        back = [
            graph.node("Reshape", [after.output[0], graph.constant("shape", shape)], [split]),
            graph.node("Transpose", [split], [node.output[0]], perm=[0, 2, 1, 3]),
        ]
    graph.replace([node], [*before, attention, after, *back])
    _retype(graph, index, grid.bits)


def _parts(graph: Graph, index: int) -> tuple[onnx.NodeProto, list[onnx.NodeProto]] | None:
    """The attention of a layer, and what joins its old and new keys, its old and new values."""
    names = [f"present.{index}.{part}" for part in ("key", "value")]
    joined = [j for name in names if (j := graph.writer(name)) is not None]
    readers = [_reader(graph, name) for name in names]
    plain = [j for j in joined if j.op_type == "Concat" and len(j.input) == 2]
    if readers[0] is None or readers[0] is not readers[1] or len(plain) != 2:
        return None
    return readers[0], plain


def _reader(graph: Graph, value: str) -> onnx.NodeProto | None:
    """The Attention that alone reads `value`, past what repeats it for every query head."""
    while True:
        readers = graph.readers(value)
        if len(readers) != 1:
            return None
        if readers[0].op_type == "Attention":
            return readers[0]
        if readers[0].op_type not in ("Unsqueeze", "Expand", "Reshape"):
            return None
        value = readers[0].output[0]


def _flat(graph: Graph, name: str, shapes: dict[str, list[int]], reader: onnx.NodeProto) -> str:
    """[batch, heads, length, width] as [batch, length, heads * width]."""
    if (found := before_turn(graph, name, shapes)) is not None:
        return found
    rotary = graph.writer(name)
    if rotary is not None and rotary.op_type == "RotaryEmbedding" and len(graph.readers(name)) == 1:
        # It takes either layout; `num_heads` is set by the tracer.
        source = before_turn(graph, rotary.input[0], shapes)
        if source is not None and any(a.name == "num_heads" for a in rotary.attribute):
            rotary.input[0] = source
            rotary.output[0] = graph.name("rotated")
            return str(rotary.output[0])
    turned, flat = graph.name("turned"), graph.name("flat")
    shape = graph.constant("shape", np.array([0, 0, -1], np.int64))
    turn = graph.node("Transpose", [name], [turned], perm=[0, 2, 1, 3])
    graph.before(reader, [turn, graph.node("Reshape", [turned, shape], [flat])])
    return flat


def _shifted(graph: Graph, kind: str, name: str, offset: np.ndarray) -> onnx.NodeProto:
    constant = graph.constant("offset", offset.astype(np.float32))
    return graph.node(kind, [name, constant], [graph.name("shifted")])


def _bias(graph: Graph, attention: onnx.NodeProto, known: dict[str, str]) -> str:
    """What is added to the scores: of a bool mask 0 or nearly minus infinity."""
    mask = attention.input[3]
    maker = graph.writer(mask)
    # The tracer makes masks of comparisons; what is no bool is added as it is.
    kinds = {v.name: v.type.tensor_type.elem_type for v in graph.proto.graph.value_info}
    if kinds.get(mask, TensorProto.BOOL if maker else 0) != TensorProto.BOOL:
        return str(mask)
    if mask not in known:
        zero = graph.constant("zero", np.array(0, np.float32))
        never = graph.constant("never", np.array(_NEVER, np.float32))
        known[mask] = graph.name("bias")
        graph.before(attention, [graph.node("Where", [mask, zero, never], [known[mask]])])
    return known[mask]


def _lengths(graph: Graph) -> list[str]:
    """Names of the last key's place, int32 [batch], and of the number of keys, int32 scalar.

    Every row has all keys: which of them are padding is the mask's to say.
    """
    end, wide, whole = graph.name("end"), graph.name("wide"), graph.name("total")
    last, rows, places = graph.name("last"), graph.name("rows"), graph.name("places")
    one = graph.constant("one", np.array(1, np.int32))
    axis = graph.constant("axis", np.array([0], np.int64))
    graph.nodes[:0] = [
        graph.node("Shape", ["attention_mask"], [end], start=1, end=2),
        graph.node("Cast", [end], [wide], to=TensorProto.INT32),
        graph.node("Squeeze", [wide, axis], [whole]),
        graph.node("Sub", [wide, one], [last]),
        graph.node("Shape", ["attention_mask"], [rows], start=0, end=1),
        graph.node("Expand", [last, rows], [places]),
    ]
    return [places, whole]


def _retype(graph: Graph, index: int, bits: int) -> None:
    """The cache among the graph's inputs and outputs."""
    names = {f"{stem}.{index}.{part}" for stem in ("past_key_values", "present")
             for part in ("key", "value")}  # fmt: skip
    for value in [*graph.proto.graph.input, *graph.proto.graph.output]:
        if value.name in names:
            kind = value.type.tensor_type
            kind.elem_type = TensorProto.INT8 if bits == 8 else TensorProto.UINT8
            if bits == 4:
                kind.shape.dim[3].dim_value = (kind.shape.dim[3].dim_value + 1) // 2
