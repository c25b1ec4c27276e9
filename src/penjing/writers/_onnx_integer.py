"""8-bit weights times 8-bit activations, in the layouts measured fastest in onnxruntime.

Linear, y = ((u8 x) @ (s8 W^T) * scale_x * scale_w) + bias, float out:
    static range    QuantizeLinear once a tensor, then com.microsoft MatMulIntegerToFloat
    dynamic range   com.microsoft DynamicQuantizeMatMul
written as such: left to the runtime, the fusion of QDQ pairs loses the bias (15 % of a
MiniLM batch of 1). Layers that read the same tensor become one product and a Split.

Convolution: QDQ on input, weight and bias; a pair on the output comes from the next
convolution. One whose output something else reads too, an addition say, would hand it on rounded;
with a kernel of one place it is the product of a linear layer, channels last, and its output stays
in floats (EfficientNet-Lite0 with these products ran in three quarters of the time that float
products of the same layers took). A larger kernel whose output nobody quantizes has its float
product and its integers as weights: quantizing only its input would cost time and accuracy for
nothing. The input is cut to its range, as rounding would do.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import onnx

from penjing.planes import IntegerPlanes
from penjing.recipe import ActivationRange
from penjing.writers._onnx_blocks import place
from penjing.writers._onnx_edit import Graph
from penjing.writers._onnx_uses import Use

__all__ = ["Layer", "place_kernels", "place_matrices"]

_PASSED = ("Clip", "Relu")


@dataclass(frozen=True, eq=False)
class Layer:
    """A use of a weight with signed codes whose input has a range."""

    name: str
    use: Use
    planes: IntegerPlanes
    range: ActivationRange

    @property
    def codes(self) -> np.ndarray:
        """int8 [out, in]."""
        codes = self.planes.signed
        assert codes is not None  # `onnx.py` makes layers of such weights alone
        return np.asarray(codes.numpy())

    @property
    def scale(self) -> np.ndarray:
        """float32 [out]."""
        return np.asarray(self.planes.scale[0].numpy().reshape(-1))


def place_matrices(graph: Graph, layers: list[Layer]) -> None:
    """Linear layers with 8-bit inputs."""
    groups: dict[tuple[str, tuple[float, int, bytes]], list[Layer]] = {}
    for layer in layers:
        groups.setdefault((layer.use.node.input[0], layer.range.key), []).append(layer)
    for key, group in groups.items():
        value, (scale, zero, _) = key
        names = [layer.name for layer in group]
        ends, gone = zip(*(_bias(graph, layer) for layer in group), strict=True)
        codes = np.concatenate([layer.codes for layer in group])  # [sum of out, in]
        biases = np.concatenate([bias for bias, _ in ends])
        stem = names[0]
        weight = graph.constant(f"{stem}.codes", np.ascontiguousarray(codes.T))  # [in, out]
        scales = np.concatenate([layer.scale for layer in group])
        bias = graph.constant(f"{stem}.bias", biases) if biases.any() else ""
        output = ends[0][1] if len(group) == 1 else graph.name("merged")
        made = []
        if (factor := group[0].range.factor) is not None:
            divided = graph.name("divided")
            inputs = [value, graph.constant(f"{stem}.factor", factor.numpy())]
            made.append(graph.node("Mul", inputs, [divided]))
            value = divided
        if scale == 0:
            weight_scale = graph.constant(f"{stem}.scale", scales)
            inputs = [value, weight, weight_scale, "", bias]
            kind = "DynamicQuantizeMatMul"
        else:
            x = graph.name("input.codes")
            x_scale = graph.constant("input.scale", np.array(scale, np.float32))
            x_zero = graph.constant("input.zero", np.array(zero, np.uint8))
            made.append(graph.node("QuantizeLinear", [value, x_scale, x_zero], [x]))
            inputs = [
                x, weight, x_scale, graph.constant(f"{stem}.scale", scales), x_zero, "", bias
            ]  # fmt: skip
            kind = "MatMulIntegerToFloat"
        while not inputs[-1]:
            inputs.pop()
        made.append(graph.node(kind, inputs, [output], "com.microsoft"))
        if len(group) > 1:
            sizes = graph.constant("sizes", np.array([len(layer.codes) for layer in group]))
            made.append(graph.node("Split", [output, sizes], [end for _, end in ends], axis=-1))
        # The bias Adds may stand later than other readers: everything moves to the front.
        graph.replace([n for nodes in gone for n in nodes], made)


def _bias(graph: Graph, layer: Layer) -> tuple[tuple[np.ndarray, str], list[onnx.NodeProto]]:
    """The layer's bias and the value that holds its result, and the nodes that did both."""
    node = layer.use.node
    width = len(layer.codes)
    if node.op_type == "Gemm":
        has = len(node.input) > 2 and node.input[2] in graph.constants
        bias = graph.array(node.input[2]) if has else np.zeros(width, np.float32)
        return (np.broadcast_to(bias, (width,)).astype(np.float32), node.output[0]), [node]
    readers = graph.readers(node.output[0])
    if len(readers) == 1 and readers[0].op_type == "Add" and node.output[0] not in graph.outputs:
        other = next(x for x in readers[0].input if x != node.output[0])
        if other in graph.constants and graph.array(other).shape == (width,):
            return (graph.array(other), readers[0].output[0]), [node, readers[0]]
    return (np.zeros(width, np.float32), node.output[0]), [node]


def place_kernels(graph: Graph, layers: list[Layer]) -> None:
    """Convolutions with 8-bit inputs."""
    grids: dict[str, ActivationRange] = {}
    for layer in layers:
        grids.setdefault(layer.use.node.input[0], layer.range)
    made, floats = set(), []
    inputs = {id(layer.use.node) for layer in layers}
    for layer in layers:
        node = layer.use.node
        passed, end = _chain(graph, node)
        grid = grids.get(end)
        fused = (
            grid is not None
            and 0 not in (grid.scale, layer.range.scale)
            and all(_is_redundant(graph, other, grid) for other in passed)
        )
        alone = end not in graph.outputs and all(
            id(reader) in inputs or reader.op_type == "QuantizeLinear"
            for reader in graph.readers(end)
        )
        if not (fused and alone) and layer.range.scale and _is_pointwise(node, layer.planes):
            _product(graph, layer)
            continue
        if not fused:
            place(graph, layer.name, layer.planes, [layer.use])
            floats.append(layer)
            continue
        made.add(id(node))
        _kernel(graph, layer)
        node.input[0] = _pair(graph, node.input[0], layer.range)
        if passed:
            # The grid ends where the activation cuts; left in, it would block the fusion.
            graph.replace(passed, [])
            node.output[0] = end
    for value, grid in grids.items():
        if id(graph.writer(value)) not in made:
            continue
        for reader in graph.readers(value):
            # The runtime fuses a convolution only when its result is read quantized alone.
            if reader.op_type != "QuantizeLinear":
                paired = _pair(graph, value, grid)
                for index, name in enumerate(reader.input):
                    if name == value:
                        reader.input[index] = paired
    for layer in floats:
        if layer.range.scale:
            _cut(graph, layer.use.node, layer.range)


def _cut(graph: Graph, node: onnx.NodeProto, grid: ActivationRange) -> None:
    """Cut the input of a float convolution to what its grid can hold."""
    value = node.input[0]
    writer = graph.writer(value)
    if writer is not None and writer.op_type == "DequantizeLinear":
        return
    low, high = _ends(grid)
    known = _bounds(graph, writer) if writer is not None and writer.op_type in _PASSED else None
    if known is not None and low <= known[0] and known[1] <= high:
        return
    new = value
    if known is not None and len(graph.readers(value)) == 1 and value not in graph.outputs:
        # One cut in place of two, which the runtime makes a part of the convolution before it.
        low, high = max(low, known[0]), min(high, known[1])
    else:
        writer, new = None, graph.name("cut")
    limits = [graph.constant("cut", np.array(limit, np.float32)) for limit in (low, high)]
    if writer is None:
        graph.before(node, [graph.node("Clip", [value, *limits], [new])])
        node.input[0] = new
    else:
        graph.replace([writer], [graph.node("Clip", [writer.input[0], *limits], [new])])


def _chain(graph: Graph, node: onnx.NodeProto) -> tuple[list[onnx.NodeProto], str]:
    """The Relu and Clip nodes that alone read a convolution's result, and the last value."""
    value, passed = node.output[0], []
    readers = graph.readers(value)
    while len(readers) == 1 and readers[0].op_type in _PASSED:
        passed.append(readers[0])
        value = readers[0].output[0]
        readers = graph.readers(value)
    return passed, value


def _is_redundant(graph: Graph, node: onnx.NodeProto, grid: ActivationRange) -> bool:
    """Whether rounding to `grid` cuts at least where the Relu or Clip `node` does."""
    slack = 0.5 * grid.scale
    low, high = _ends(grid)
    known = _bounds(graph, node)
    return known is not None and low >= known[0] - slack and high <= known[1] + slack


def _ends(grid: ActivationRange) -> tuple[float, float]:
    """The least and the largest number of a grid."""
    return -grid.zero_point * grid.scale, (255 - grid.zero_point) * grid.scale


def _bounds(graph: Graph, node: onnx.NodeProto) -> tuple[float, float] | None:
    """What a Relu or Clip gives at least and at most; None where that is found at run time."""
    if node.op_type == "Relu":
        return 0.0, math.inf
    names = [*node.input[1:], "", ""][:2]
    if any(name and name not in graph.constants for name in names):
        return None
    low, high = (float(graph.array(name)) if name else None for name in names)
    return -math.inf if low is None else low, math.inf if high is None else high


def _is_pointwise(node: onnx.NodeProto, planes: IntegerPlanes) -> bool:
    """Whether a convolution is one product for all places: one place of a kernel, each place."""
    given = {a.name: a for a in node.attribute}
    steps = given["strides"].ints if "strides" in given else ()
    pads = given["pads"].ints if "pads" in given else ()
    groups = given["group"].i if "group" in given else 1
    return (
        planes.shape[2:] == (1,) * len(planes.shape[2:])
        and groups == 1 and set(steps) <= {1} and set(pads) <= {0}
    )  # fmt: skip


def _product(graph: Graph, layer: Layer) -> None:
    """A convolution of one place as the product of its channels, put last; floats come out."""
    node, stem = layer.use.node, layer.name
    back = graph.writer(_pair(graph, node.input[0], layer.range))
    assert back is not None  # `_pair` made it
    quantize = graph.writer(back.input[0])
    assert quantize is not None
    dims = len(layer.planes.shape)
    last, product = graph.name("channels.last"), graph.name("product")
    codes = graph.constant(f"{stem}.codes", np.ascontiguousarray(layer.codes.T))  # [in, out]
    inputs = [
        last, codes, quantize.input[1], graph.constant(f"{stem}.scale", layer.scale),
        quantize.input[2],
    ]  # fmt: skip
    if len(node.input) > 2 and node.input[2]:
        inputs += ["", node.input[2]]
    first = [0, dims - 1, *range(1, dims - 1)]
    new = [
        graph.node("Transpose", [back.input[0]], [last], perm=[0, *range(2, dims), 1]),
        graph.node("MatMulIntegerToFloat", inputs, [product], "com.microsoft"),
        graph.node("Transpose", [product], [node.output[0]], perm=first),
    ]
    graph.replace([node], new)


def _pair(graph: Graph, value: str, grid: ActivationRange) -> str:
    """`value` quantized and back, made once."""
    for node in graph.readers(value):
        if node.op_type == "QuantizeLinear" and _same(graph, node, grid):
            readers = graph.readers(node.output[0])
            made: str = next(r.output[0] for r in readers if r.op_type == "DequantizeLinear")
            return made
    parts = [
        graph.constant("input.scale", np.array(grid.scale, np.float32)),
        graph.constant("input.zero", np.array(grid.zero_point, np.uint8)),
    ]
    codes, back = graph.name("input.codes"), graph.name("input.float")
    graph.before(
        graph.readers(value)[0],
        [
            graph.node("QuantizeLinear", [value, *parts], [codes]),
            graph.node("DequantizeLinear", [codes, *parts], [back]),
        ],
    )
    return back


def _same(graph: Graph, node: onnx.NodeProto, grid: ActivationRange) -> bool:
    scale, zero = graph.array(node.input[1]), graph.array(node.input[2])
    return bool(scale == np.float32(grid.scale) and zero == grid.zero_point)


def _kernel(graph: Graph, layer: Layer) -> None:
    node, stem = layer.use.node, layer.name
    parts = [
        graph.constant(f"{stem}.codes", layer.codes.reshape(layer.planes.shape)),
        graph.constant(f"{stem}.scale", layer.scale),
        graph.constant(f"{stem}.zero", np.zeros(len(layer.codes), np.int8)),
    ]
    weight = graph.name(f"{stem}.float")
    graph.before(node, [graph.node("DequantizeLinear", parts, [weight], axis=0)])
    node.input[layer.use.index] = weight
    if len(node.input) > 2 and node.input[2] in graph.constants:
        scale = (layer.scale * np.float32(layer.range.scale)).astype(np.float32)
        scale = np.where(scale == 0, np.float32(1), scale)
        limits = np.iinfo(np.int32)
        ticks = np.round(graph.array(node.input[2]).astype(np.float64) / scale)
        bias = [
            graph.constant(f"{stem}.bias", np.clip(ticks, limits.min, limits.max).astype(np.int32)),
            graph.constant(f"{stem}.bias.scale", scale),
        ]
        float_bias = graph.name(f"{stem}.bias.float")
        graph.before(node, [graph.node("DequantizeLinear", bias, [float_bias], axis=0)])
        node.input[2] = float_bias
