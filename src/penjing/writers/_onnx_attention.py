"""Attention that reads and gives [batch, length, heads * width], heads side by side.

The tracer turns queries, keys and values to [batch, heads, length, width] in front of the
operator and its result back behind it. Opset 23's Attention takes them flat just as well.
"""

from __future__ import annotations

import numpy as np
import onnx
from onnx import helper

from penjing.writers._onnx_edit import Graph

__all__ = ["after_turn", "before_turn", "flatten_attention", "repeat_rotary", "shapes_of"]

_TURN = [0, 2, 1, 3]  # batch, length, heads, width and back


def flatten_attention(graph: Graph) -> None:
    """Take the turns away from every Attention that has them on all sides."""
    shapes = shapes_of(graph)
    for node in graph.nodes:
        # With more outputs it gives the keys and values of a cache, which are turned.
        if node.op_type != "Attention" or len(node.output) != 1 or len(node.input) > 4:
            continue
        flat = [before_turn(graph, name, shapes) for name in node.input[:3]]
        heads = [shapes.get(name, [0, 0])[1] for name in node.input[:3]]
        end = after_turn(graph, node, shapes)
        if None in flat or end is None or not all(heads) or heads[1] != heads[2]:
            continue
        node.input[:3] = [str(name) for name in flat]
        node.output[0] = end.output[0]
        for name, count in (("q_num_heads", heads[0]), ("kv_num_heads", heads[1])):
            node.attribute.append(helper.make_attribute(name, count))
        # Dead from here on; another node must not make what the attention gives now.
        end.output[0] = graph.name("dead")


def repeat_rotary(graph: Graph) -> None:
    """Angles of one sample repeated for each: onnxruntime's RotaryEmbedding does not broadcast."""
    shapes, repeated = shapes_of(graph), dict[str, str]()
    for node in [n for n in graph.nodes if n.op_type == "RotaryEmbedding"]:
        for place in (1, 2):
            name = node.input[place]
            writer = graph.writer(name)
            known = shapes.get(name) or shapes.get(writer.input[0] if writer else "") or [0]
            if known[0] != 1:  # of a decoder with a cache they are of each sample
                continue
            if name not in repeated:
                batch, size, repeated[name] = (graph.name(s) for s in ("batch", "size", "repeated"))
                ones = graph.constant("ones", np.array([1, 1], np.int64))
                made = [
                    graph.node("Shape", [node.input[0]], [batch], start=0, end=1),
                    graph.node("Concat", [batch, ones], [size], axis=0),
                    graph.node("Expand", [name, size], [repeated[name]]),
                ]
                graph.before(node, made)
            node.input[place] = repeated[name]


def shapes_of(graph: Graph) -> dict[str, list[int]]:
    """Shape of each value that the tracer noted one of, 0 for a free size."""
    values = [*graph.proto.graph.value_info, *graph.proto.graph.output]
    return {v.name: [d.dim_value for d in v.type.tensor_type.shape.dim] for v in values}


def before_turn(graph: Graph, name: str, shapes: dict[str, list[int]]) -> str | None:
    """What is reshaped and turned into `name`, [batch, length, heads * width]."""
    turn = graph.writer(name)
    if turn is None or not _is_turn(turn):
        return None
    reshape = graph.writer(turn.input[0])
    if reshape is None or reshape.op_type != "Reshape":
        return None
    flat, heads = shapes.get(reshape.input[0], []), shapes.get(name, [])
    whole = len(heads) == 4 and len(flat) == 3 and flat[2] == heads[1] * heads[3] > 0
    return reshape.input[0] if whole else None


def after_turn(
    graph: Graph, node: onnx.NodeProto, shapes: dict[str, list[int]]
) -> onnx.NodeProto | None:
    """The reshape that alone reads the turned output."""
    readers = graph.readers(node.output[0])
    if len(readers) != 1 or not _is_turn(readers[0]):
        return None
    after = graph.readers(readers[0].output[0])
    given = shapes.get(node.output[0], [])
    if len(after) != 1 or after[0].op_type != "Reshape" or len(given) != 4:
        return None
    flat = shapes.get(after[0].output[0], [])
    return after[0] if len(flat) == 3 and flat[2] == given[1] * given[3] > 0 else None


def _is_turn(node: onnx.NodeProto) -> bool:
    perm = next((list(a.ints) for a in node.attribute if a.name == "perm"), [])
    return node.op_type == "Transpose" and perm == _TURN
