"""Attention without turns: the same numbers, fewer nodes, and what does not fit is left."""

from __future__ import annotations

from collections import Counter

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper

from penjing.writers._onnx_attention import flatten_attention
from penjing.writers._onnx_edit import Graph


def attention(*, twice: bool = False, perm: tuple[int, ...] = (0, 2, 1, 3)) -> onnx.ModelProto:
    """Two heads of three channels on x [2, 5, 6], the result plus itself unturned if `twice`."""
    nodes = []
    for name in "qkv":
        nodes += [
            helper.make_node("Reshape", ["x", "four"], [f"{name}4"]),
            helper.make_node("Transpose", [f"{name}4"], [name], perm=perm),
        ]
    nodes += [
        helper.make_node("Attention", ["q", "k", "v"], ["a"]),
        helper.make_node("Transpose", ["a"], ["at"], perm=[0, 2, 1, 3]),
        helper.make_node("Reshape", ["at", "three"], ["y"]),
    ]
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, [2, 5, 6])]
    if twice:
        nodes.append(helper.make_node("Neg", ["a"], ["z"]))
        outputs.append(helper.make_tensor_value_info("z", TensorProto.FLOAT, [2, 2, 5, 3]))
    values = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, [2, 2, 5, 3]) for name in "qkva"
    ] + [helper.make_tensor_value_info("x", TensorProto.FLOAT, [2, 5, 6])]
    constants = [
        helper.make_tensor("four", TensorProto.INT64, [4], [2, 5, 2, 3]),
        helper.make_tensor("three", TensorProto.INT64, [3], [2, 5, 6]),
    ]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [2, 5, 6])
    graph = helper.make_graph(nodes, "g", [x], outputs, constants, value_info=values)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)


def rewritten(proto: onnx.ModelProto) -> onnx.ModelProto:
    copy = onnx.ModelProto()
    copy.CopyFrom(proto)
    graph = Graph(copy)
    flatten_attention(graph)
    return graph.finish()


def run(proto: onnx.ModelProto) -> list[np.ndarray]:
    x = np.random.default_rng(0).standard_normal((2, 5, 6), np.float32)
    return onnxruntime.InferenceSession(proto.SerializeToString()).run(None, {"x": x})


def test_the_flat_operator_gives_the_same() -> None:
    proto = attention()
    made = rewritten(proto)
    assert [n.op_type for n in made.graph.node] == ["Attention"]
    np.testing.assert_array_equal(run(made)[0], run(proto)[0])


def test_a_result_that_is_read_turned_too_is_left() -> None:
    proto = attention(twice=True)
    assert [n.op_type for n in rewritten(proto).graph.node] == [n.op_type for n in proto.graph.node]


def test_another_turn_is_left() -> None:
    # Heads and places exchanged once more than the operator's flat form does.
    proto = attention(perm=(0, 1, 2, 3))
    assert Counter(n.op_type for n in rewritten(proto).graph.node)["Transpose"] == 4
