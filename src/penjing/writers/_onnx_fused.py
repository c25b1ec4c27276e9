"""Integer queries, keys and values and their attention as one operator of onnxruntime.

QAttention makes the product of the three with 8-bit inputs head by head and attends at once:
nothing is split, and no heads are turned. It takes padding as it comes in, [batch, length], so
what the graph makes of it has to be no more than that; this is seen by running those nodes.
"""

from __future__ import annotations

import math

import numpy as np
import onnx
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator

from penjing.writers._onnx_edit import Graph

__all__ = ["fuse_attention"]

_PADDING = "attention_mask"
_SIZES = ((3, 7), (2, 5))  # batch, length


def fuse_attention(graph: Graph) -> None:
    """Every flat Attention whose inputs are the parts of one static integer product."""
    graph.sweep()
    padding: dict[str, str | None] = {"": ""}
    cast = ""
    for node in list(graph.nodes):
        product = _product(graph, node)
        if product is None:
            continue
        width = graph.array(product.input[1]).shape[1]
        heads = _heads(node, width // 3)
        if not heads:
            continue
        mask = node.input[3] if len(node.input) > 3 else ""
        if mask not in padding:
            padding[mask] = _padding(graph, mask)
        if (source := padding[mask]) is None:
            continue
        if source and not cast:
            cast = graph.name("padding")
            made = graph.node("Cast", [source], [cast], to=TensorProto.INT32)
            graph.nodes.insert(0, made)
        x, weight, x_scale, scale, x_zero, *rest = product.input
        bias = rest[1] if len(rest) > 1 else graph.constant("bias", np.zeros(width, np.float32))
        output = node.output[0]
        # Factors on what attention gives are as good on the values.
        if (found := _factor(graph, output, width // 3)) is not None:
            factor, output = np.ones(width, np.float32), found.output[0]
            factor[-(width // 3) :] = graph.array(found.input[1])
            scale, bias = (graph.constant(n, graph.array(n) * factor) for n in (scale, bias))
            graph.replace([found], [])
        zero = graph.constant("zero", np.array(0, np.int8))
        fused = graph.node(
            "QAttention",
            [x, weight, bias, x_scale, scale, cast if source else "", x_zero, zero],
            [output], "com.microsoft", num_heads=heads,
        )  # fmt: skip
        graph.replace([node], [fused])


def _product(graph: Graph, node: onnx.NodeProto) -> onnx.NodeProto | None:
    """What alone makes the queries, keys and values of an Attention, in this order."""
    if node.op_type != "Attention" or len(node.output) != 1 or len(node.input) not in (3, 4):
        return None
    split = graph.writer(node.input[0])
    if split is None or split.op_type != "Split" or list(split.output) != list(node.input[:3]):
        return None
    if len(set(graph.array(split.input[1]).tolist())) != 1:
        return None
    if any(len(graph.readers(part)) != 1 for part in split.output):
        return None
    product = graph.writer(split.input[0])
    known = product is not None and product.op_type == "MatMulIntegerToFloat"
    return product if known and len(graph.readers(split.input[0])) == 1 else None


def _factor(graph: Graph, value: str, width: int) -> onnx.NodeProto | None:
    """The product with a constant [width] that alone reads a value."""
    readers = graph.readers(value)
    if value in graph.outputs or len(readers) != 1 or readers[0].op_type != "Mul":
        return None
    (node,) = readers
    constant = node.input[0] == value and node.input[1] in graph.constants
    return node if constant and graph.array(node.input[1]).shape == (width,) else None


def _heads(node: onnx.NodeProto, width: int) -> int:
    """Heads of a flat attention that is no more than that, else 0."""
    own = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    heads, groups = int(own.pop("q_num_heads", 0)), own.pop("kv_num_heads", 0)
    scale = own.pop("scale", None)
    usual = scale is None or math.isclose(scale, math.sqrt(heads / width), rel_tol=1e-6)
    return heads if heads == groups and usual and not any(own.values()) else 0


def _padding(graph: Graph, mask: str) -> str | None:
    """The input that a mask [batch, 1, length, length] repeats for every query.

    Empty where it masks nothing, None where it is something else.
    """
    nodes, needed = graph.behind({mask})
    given = [v for v in graph.proto.graph.input if v.name in needed]
    source = _PADDING if _PADDING in {v.name for v in given} else ""
    model = helper.make_model(
        helper.make_graph(
            nodes, "mask", given, [helper.make_empty_tensor_value_info(mask)],
            [tensor for name, tensor in graph.constants.items() if name in needed],
        ),
        opset_imports=list(graph.proto.opset_import),
    )  # fmt: skip
    run, rng = ReferenceEvaluator(model), np.random.default_rng(0)
    for batch, length in _SIZES:
        values = {}
        for value in given:
            kind = helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type)
            free = [d.dim_value or length for d in value.type.tensor_type.shape.dim][1:]
            values[value.name] = np.zeros((batch, *free), kind)
        keys = np.ones((batch, 1), bool)
        if source:
            keys = np.asarray(rng.integers(0, 2, values[source].shape) > 0)
            values[source] = keys.astype(values[source].dtype)
        (found,) = run.run([mask], values)
        shape = np.broadcast_shapes(found.shape, keys[:, None, None].shape)
        if found.dtype != bool or not np.array_equal(
            np.broadcast_to(found, shape), np.broadcast_to(keys[:, None, None], shape)
        ):
            return None
    return source
