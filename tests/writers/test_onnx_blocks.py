"""What onnxruntime computes from stored integers, on one-hot inputs, against numpy."""

import collections
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from penjing.errors import ExportError
from penjing.planes import IntegerPlanes, Scheme
from penjing.quantizers import additive, binary, hqq, power2, residual, rtn, ternary, trellis
from penjing.rotation import Rotation
from penjing.writers._onnx_blocks import place, problem
from penjing.writers._onnx_edit import Graph
from penjing.writers._onnx_uses import Use

FITS = {
    "integer": rtn.fit, "residual": residual.fit, "binary": binary.fit,
    "ternary": ternary.fit, "power2": power2.fit,
}  # fmt: skip


def random(rows: int, width: int, seed: int = 0) -> torch.Tensor:
    made = torch.Generator().manual_seed(seed)
    return torch.randn(rows, width, generator=made) * torch.rand(rows, 1, generator=made)


def by_hand(planes: IntegerPlanes) -> np.ndarray:
    """w = sum of scale * integer + shift in float64, element by element of the formula."""
    out, inputs = planes.codes.shape[1], planes.inputs
    group = np.arange(inputs) // planes.group
    w = planes.shift.numpy().astype(np.float64)[:, group]
    for k in range(len(planes.bits)):
        z = planes.codes[k].numpy().astype(np.int64)
        if planes.tables is not None:
            z = planes.tables[k].numpy().astype(np.int64)[z].reshape(out, -1)[:, :inputs]
        w = w + planes.scale[k].numpy().astype(np.float64)[:, group] * z
    return w


def written(planes: IntegerPlanes, kind: str = "MatMul") -> onnx.ModelProto:
    value = planes.dequantize().numpy()
    rows, width = value.shape
    gather = kind == "Gather"
    inputs = ["w", "x"] if gather else ["x", "w"]
    stored = numpy_helper.from_array(np.ascontiguousarray(value if gather else value.T), "w")
    kind_of, shape = (TensorProto.INT64, ["n"]) if gather else (TensorProto.FLOAT, ["n", width])
    ends = (
        helper.make_tensor_value_info("x", kind_of, shape),
        helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", width if gather else rows]),
    )
    node = helper.make_node(kind, inputs, ["y"])
    proto = helper.make_model(
        helper.make_graph([node], "g", [ends[0]], [ends[1]], [stored]),
        opset_imports=[helper.make_opsetid("", 21)], ir_version=10,
    )  # fmt: skip
    graph = Graph(proto)
    place(graph, "w", planes, [Use(graph.nodes[0], inputs.index("w"), not gather, "")])
    made = graph.finish()
    onnx.checker.check_model(made)
    return made


def run(proto: onnx.ModelProto, x: np.ndarray, optimized: Path | None = None) -> np.ndarray:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    if optimized is not None:
        options.optimized_model_filepath = str(optimized)
    session = onnxruntime.InferenceSession(
        proto.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return np.asarray(session.run(None, {"x": x})[0])


def bytes_of(proto: onnx.ModelProto) -> int:
    return sum(numpy_helper.to_array(t).nbytes for t in proto.graph.initializer)


def same(planes: IntegerPlanes, proto: onnx.ModelProto, kind: str = "MatMul") -> None:
    wanted = by_hand(planes)
    if kind == "Gather":
        got = run(proto, np.arange(len(wanted)))
    else:
        # A one-hot input is exact in int8: its block's scale is 1/127 and its code 127.
        got = run(proto, np.eye(wanted.shape[1], dtype=np.float32)).T
    assert np.abs(got - wanted).max() <= 2e-6 * np.abs(wanted).max()


@pytest.mark.parametrize("scale_bits", [32, 16, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group", [0, 16, 32, 48, 64, 256, 384])
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8])
def test_integers(bits: int, group: int, symmetric: bool, scale_bits: int) -> None:
    scheme = Scheme(bits, group, symmetric, scale_bits=scale_bits)
    planes = rtn.fit(random(24, 400, bits), scheme, None)
    assert problem(planes, "MatMul") == ""
    proto = written(planes)
    assert sum(n.op_type == "MatMulNBits" for n in proto.graph.node) == 1
    assert not any(n.op_type == "MatMul" for n in proto.graph.node)
    same(planes, proto)
    same(planes, written(planes, "Gather"), "Gather")


SUMS = [
    ("residual", 4, 2), ("residual", 3, 2), ("residual", 6, 2), ("binary", 1, 1), ("binary", 2, 2),
    ("binary", 3, 3), ("ternary", 1.6, 1), ("ternary", 3.2, 2), ("power2", 3, 1), ("power2", 4, 1),
]  # fmt: skip


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group", [0, 64])
@pytest.mark.parametrize(("family", "bits", "products"), SUMS)
def test_sums(family: str, bits: float, products: int, group: int, symmetric: bool) -> None:
    scheme = Scheme(bits, group, symmetric, family, scale_bits=16)
    planes = FITS[family](random(20, 192, 3), scheme, None)
    assert problem(planes, "MatMul") == ""
    proto = written(planes)
    assert sum(n.op_type == "MatMulNBits" for n in proto.graph.node) == products
    same(planes, proto)
    same(planes, written(planes, "Gather"), "Gather")


def test_a_sum_that_is_one_uniform_grid_is_one_product() -> None:
    torch.manual_seed(0)
    codes = torch.randint(0, 4, (2, 10, 64), dtype=torch.uint8)
    fine = torch.rand(10, 2) + 0.1
    scale = torch.stack([4 * fine, fine])
    planes = IntegerPlanes(codes, (2, 2), scale, -fine * 7, 32)
    proto = written(planes)
    assert sum(n.op_type == "MatMulNBits" for n in proto.graph.node) == 1
    same(planes, proto)
    # The codes are 4 * first + second, packed low first; 8 - 7 more, as 8 is the middle.
    stored = next(numpy_helper.to_array(t) for t in proto.graph.initializer if ".codes" in t.name)
    wanted = (4 * codes[0] + codes[1]).numpy()
    low, high = (stored & 15).reshape(10, -1), (stored >> 4).reshape(10, -1)
    both = np.stack([low, high], -1).reshape(10, 64)
    assert np.array_equal(both, wanted)


def test_zero_points_between_integers() -> None:
    planes = hqq.fit(random(12, 96), Scheme(4, 32), None, whole=False)
    proto = written(planes)
    assert any(n.op_type == "MatMul" for n in proto.graph.node)  # the thin float product
    same(planes, proto)
    same(planes, written(planes, "Gather"), "Gather")


def test_a_group_of_zeros_and_a_short_last_block() -> None:
    weight = random(9, 100)
    weight[3] = 0
    weight[:, 64:96] = 0
    for scheme in (Scheme(4, 32), Scheme(2, 32, True), Scheme(8, 0)):
        planes = rtn.fit(weight, scheme, None)
        same(planes, written(planes))


def test_codes_of_several_weights_are_refused_by_a_line() -> None:
    planes = additive.fit(random(16, 32), Scheme(1.0, 0, codes="additive"), None)
    assert "8 weights at once" in problem(planes, "MatMul")
    walked = trellis.fit(random(16, 32), Scheme(2, 0, codes="trellis"), None)
    assert "6 weights at once" in problem(walked, "MatMul")
    eights = rtn.fit(random(16, 32), Scheme(4, 8), None)
    assert "groups of 8" in problem(eights, "MatMul")


@pytest.mark.parametrize(("scale_bits", "size"), [(32, 4), (16, 2), (8, 1 + 4 / 64)])
def test_scales_take_the_bytes_that_the_planes_have(
    scale_bits: int, size: float, tmp_path: Path
) -> None:
    planes = rtn.fit(random(64, 512), Scheme(4, 32, True, scale_bits=scale_bits), None)
    proto = written(planes)
    groups = 64 * 512 // 32
    constants = 100  # sizes of reshapes
    assert 0 <= bytes_of(proto) - 64 * 256 - groups * size <= constants
    # The runtime works the scales out when it loads: what is left is the one product.
    run(proto, np.zeros((1, 512), np.float32), tmp_path / "optimized.onnx")
    left = [n.op_type for n in onnx.load(tmp_path / "optimized.onnx").graph.node]
    assert left == ["MatMulNBits"]


def test_one_scale_a_row_is_stored_once(tmp_path: Path) -> None:
    planes = rtn.fit(random(64, 512), Scheme(4, 0), None)
    proto = written(planes)
    # codes, scale and a byte with the zero point twice
    assert 0 <= bytes_of(proto) - 64 * (256 + 4 + 1) <= 200
    run(proto, np.zeros((1, 512), np.float32), tmp_path / "optimized.onnx")
    left = [n.op_type for n in onnx.load(tmp_path / "optimized.onnx").graph.node]
    assert left == ["MatMulNBits"]


@pytest.mark.parametrize("family", ["integer", "residual", "ternary"])
def test_convolutions(family: str) -> None:
    bits = {"integer": 4, "residual": 4, "ternary": 1.6}[family]
    planes = FITS[family](random(8, 27), Scheme(bits, 0, False, family), None)
    planes = IntegerPlanes(
        planes.codes, planes.bits, planes.scale, planes.shift, planes.group, (8, 3, 3, 3),
        offset=planes.offset, centre=planes.centre,
    )  # fmt: skip
    value = planes.dequantize().numpy()
    node = helper.make_node("Conv", ["x", "w"], ["y"])
    ends = [
        helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 3, 3, 3]),
        helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 8, 1, 1]),
    ]
    proto = helper.make_model(
        helper.make_graph([node], "g", ends[:1], ends[1:], [numpy_helper.from_array(value, "w")]),
        opset_imports=[helper.make_opsetid("", 21)], ir_version=10,
    )  # fmt: skip
    graph = Graph(proto)
    place(graph, "w", planes, [Use(graph.nodes[0], 1, False, "")])
    got = run(graph.finish(), np.eye(27, dtype=np.float32).reshape(27, 3, 3, 3))
    wanted = by_hand(planes)
    assert np.abs(got.reshape(27, 8).T - wanted).max() <= 2e-6 * np.abs(wanted).max()


def attention(planes: list[IntegerPlanes]) -> onnx.ModelProto:
    """Several layers that read one tensor [batch, length, in]."""
    width = planes[0].inputs
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["b", "n", width])
    outs, nodes, stored = [], [], []
    for k, own in enumerate(planes):
        value = own.dequantize().numpy()
        outs.append(
            helper.make_tensor_value_info(f"y{k}", TensorProto.FLOAT, ["b", "n", len(value)])
        )
        nodes.append(helper.make_node("MatMul", ["x", f"w{k}"], [f"y{k}"]))
        stored.append(numpy_helper.from_array(np.ascontiguousarray(value.T), f"w{k}"))
    proto = helper.make_model(
        helper.make_graph(nodes, "g", [x], outs, stored),
        opset_imports=[helper.make_opsetid("", 21)], ir_version=10,
    )  # fmt: skip
    graph = Graph(proto)
    uses = [Use(node, 1, True, "") for node in graph.nodes]
    # The last first: what is rotated must still stand before all its readers.
    for k in reversed(range(len(planes))):
        place(graph, f"w{k}", planes[k], [uses[k]])
    made = graph.finish()
    onnx.checker.check_model(made)
    return made


@pytest.mark.parametrize("width", [64, 96, 384])
@pytest.mark.parametrize("family", ["integer", "binary"])
def test_rotated_layers_rotate_their_input_once(family: str, width: int) -> None:
    scheme = Scheme(2 if family == "binary" else 4, 0, True, family, 16)
    planes = [
        replace(FITS[family](random(24, width, seed), scheme, None), rotation=0)
        for seed in range(3)
    ]
    proto = attention(planes)
    kinds = collections.Counter(node.op_type for node in proto.graph.node)
    assert (kinds["Mul"], kinds["Shape"], kinds["MatMul"]) == (1, 1, 2)
    assert kinds["MatMulNBits"] == (6 if family == "binary" else 3)
    q = Rotation(width).apply(torch.eye(width, dtype=torch.float64)).T.numpy()
    # Inputs that are one-hot after the rotation are exact in int8.
    x = np.stack([q, -q]).astype(np.float32)  # [batch, n, in]
    session = onnxruntime.InferenceSession(
        proto.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    for own, got in zip(planes, session.run(None, {"x": x}), strict=True):
        wanted = x.astype(np.float64) @ (by_hand(own) @ q).T
        assert got.shape == wanted.shape
        assert np.abs(got - wanted).max() <= 0.01 * np.abs(wanted).max()


def test_a_rotated_weight_is_read_by_products_alone() -> None:
    planes = replace(rtn.fit(random(8, 64), Scheme(4), None), rotation=0)
    assert problem(planes, "MatMul") == ""
    assert problem(planes, "Gather") == "1 plane of 4 bits, rotated, read by Gather"
    with pytest.raises(ExportError, match="read as a table"):
        written(planes, "Gather")
