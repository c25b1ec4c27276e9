"""Weight-only integers in onnxruntime's own operators.

    Linear      com.microsoft MatMulNBits             [rows, blocks, block * bits / 8] uint8
    Embedding   com.microsoft GatherBlockQuantized    [rows, in * bits / 8] uint8
    Conv        DequantizeLinear per output channel   [out, in, h, w] uint4 or uint8

with w = (code - zero) * scale per row and block. MatMulNBits rounds activations to int8 a
block (accuracy level 4, without which it is slower than float32). A matrix that is both
embedding and output layer is stored once.
"""

from __future__ import annotations

from dataclasses import dataclass

import ml_dtypes
import numpy as np
import onnx

from penjing.planes import IntegerPlanes
from penjing.writers._onnx_edit import Graph
from penjing.writers._onnx_uses import Use

__all__ = ["Blocks", "blocks_of", "place", "problem"]

_WIDTHS = (2, 4, 8)
_GROUPS = (16, 32, 64, 128, 256)


@dataclass(frozen=True, eq=False)
class Blocks:
    """A single plane in the layout of the operators.

    Attributes:
        codes: uint8 [rows, in].
        zero: uint8 [rows, blocks], None where every one is 2**(bits - 1).
        scale: float32 [rows, blocks].
        bits: stored width, 2, 4 or 8.
        size: inputs of a block.
    """

    codes: np.ndarray
    zero: np.ndarray | None
    scale: np.ndarray
    bits: int
    size: int


def problem(planes: IntegerPlanes, kind: str) -> str:
    """Why this cannot be stored for a node of `kind`; empty when it can."""
    if not planes.is_integer:
        return f"{planes.kind}; onnxruntime has operators for one plane of 2 to 8 bits"
    scale, zero = planes.scale[0].numpy(), planes.zero_point.numpy()
    off = np.abs(planes.shift.numpy() + scale * zero) > 1e-3 * np.abs(scale)
    if off.any() or zero.min() < 0 or zero.max() >= 2 ** _width(planes):
        return "zero points that are not whole numbers in the range of the codes"
    whole = planes.group >= planes.inputs
    if kind == "Conv":
        return "" if whole else f"groups of {planes.group}; a convolution has one scale a channel"
    if not whole and planes.group not in _GROUPS:
        return f"groups of {planes.group}; allowed: {_GROUPS} or the whole row"
    return ""


def _width(planes: IntegerPlanes) -> int:
    return next(w for w in _WIDTHS if w >= planes.bits[0])


def blocks_of(planes: IntegerPlanes, kinds: set[str]) -> Blocks:
    """Lay out a plane that has no `problem` for nodes of `kinds`."""
    codes = planes.codes[0].numpy()  # [rows, in]
    scale = planes.scale[0].numpy()  # [rows, groups]
    zero = planes.zero_point.numpy()
    bits, width, size = _width(planes), codes.shape[1], planes.group
    if size >= width:
        if kinds == {"Gather"}:
            size = max(16, 1 << (width - 1).bit_length())
        else:
            size = next((g for g in (128, 64, 32, 16) if width % g == 0), 128 if width > 64 else 16)
        count = -(-width // size)
        scale, zero = np.repeat(scale, count, axis=1), np.repeat(zero, count, axis=1)
    middle = 2 ** (bits - 1)
    if (zero == zero.flat[0]).all() and zero.flat[0] <= middle:
        shifted = codes.astype(np.int16) + (middle - int(zero.flat[0]))
        if shifted.max() < 2**bits:
            return Blocks(shifted.astype(np.uint8), None, scale, bits, size)
    return Blocks(codes, zero.astype(np.uint8), scale, bits, size)


def place(graph: Graph, name: str, planes: IntegerPlanes, uses: list[Use]) -> None:
    """Make every use of parameter `name` read its integers."""
    kernels = [u for u in uses if u.node.op_type == "Conv"]
    for use in kernels:
        _kernel(graph, name, planes, use)
    rest = [u for u in uses if u.node.op_type != "Conv"]
    if not rest:
        return
    blocks = blocks_of(planes, {u.node.op_type for u in rest})
    rows, width = blocks.codes.shape
    count = blocks.scale.shape[1]
    matrices = any(u.node.op_type != "Gather" for u in rest)
    stored = width if not matrices else count * blocks.size
    codes = np.pad(blocks.codes, ((0, 0), (0, stored - width)))
    packed = _pack(codes, blocks.bits)  # [rows, bytes]
    if matrices:
        packed = packed.reshape(rows, count, -1)
    parts = {"codes": graph.constant(f"{name}.codes", packed), "scale": _scale(graph, name, blocks)}
    if blocks.zero is not None:
        parts["zero"] = graph.constant(f"{name}.zero", _pack(blocks.zero, blocks.bits))
    for use in rest:
        if use.node.op_type == "Gather":
            _gather(graph, name, use.node, blocks, parts, matrices, width)
        else:
            _matmul(graph, use.node, blocks, parts)


def _pack(codes: np.ndarray, bits: int) -> np.ndarray:
    """[rows, n] to [rows, ceil(n * bits / 8)], low bits first."""
    per = 8 // bits
    padded = np.pad(codes, ((0, 0), (0, -codes.shape[1] % per)))
    lanes = padded.reshape(len(codes), -1, per) << (np.arange(per, dtype=np.uint8) * bits)
    packed: np.ndarray = np.bitwise_or.reduce(lanes, axis=-1).astype(np.uint8)
    return packed


def _scale(graph: Graph, name: str, blocks: Blocks) -> str:
    """Scales, in half precision where that loses nothing: the runtime casts them once."""
    half = blocks.scale.astype(np.float16)
    if not np.array_equal(half.astype(np.float32), blocks.scale):
        return graph.constant(f"{name}.scale", blocks.scale)
    stored = graph.constant(f"{name}.scale", half)
    cast = graph.name(f"{name}.scale")
    graph.nodes.insert(0, graph.node("Cast", [stored], [cast], to=onnx.TensorProto.FLOAT))
    return cast


def _matmul(graph: Graph, node: onnx.NodeProto, blocks: Blocks, parts: dict[str, str]) -> None:
    rows, width = blocks.codes.shape
    inputs = [node.input[0], parts["codes"], parts["scale"]]
    if "zero" in parts:
        inputs.append(parts["zero"])
    bias = node.input[2] if node.op_type == "Gemm" and len(node.input) > 2 else ""
    output = graph.name("matmul") if bias else node.output[0]
    made = [
        graph.node(
            "MatMulNBits", inputs, [output], "com.microsoft", K=width, N=rows,
            bits=blocks.bits, block_size=blocks.size, accuracy_level=4,
        )
    ]  # fmt: skip
    if bias:
        made.append(graph.node("Add", [output, bias], [node.output[0]]))
    graph.replace([node], made)


def _gather(
    graph: Graph,
    name: str,
    node: onnx.NodeProto,
    blocks: Blocks,
    parts: dict[str, str],
    shared: bool,
    width: int,
) -> None:
    table, made = parts["codes"], []
    if shared:
        shape = graph.constant("shape", np.array([len(blocks.codes), -1]))
        table = graph.name(f"{name}.table")
        made.append(graph.node("Reshape", [parts["codes"], shape], [table]))
    inputs = [table, node.input[1], parts["scale"], *([parts["zero"]] if "zero" in parts else [])]
    padded = shared and blocks.scale.shape[1] * blocks.size != width
    output = graph.name("gather") if padded else node.output[0]
    made.append(
        graph.node(
            "GatherBlockQuantized", inputs, [output], "com.microsoft", bits=blocks.bits,
            block_size=blocks.size, gather_axis=0, quantize_axis=1,
        )
    )  # fmt: skip
    if padded:
        ends = [graph.constant("end", np.array([n])) for n in (0, width, -1)]
        made.append(graph.node("Slice", [output, *ends], [node.output[0]]))
    graph.replace([node], made)


def _kernel(graph: Graph, name: str, planes: IntegerPlanes, use: Use) -> None:
    codes = planes.codes[0].numpy().reshape(planes.shape)
    zero = planes.zero_point.numpy().reshape(-1)
    scale = planes.scale[0].numpy().reshape(-1)
    stored = ml_dtypes.uint4 if planes.bits[0] <= 4 else np.uint8
    codes, zero = codes.astype(stored), zero.astype(stored)
    parts = [
        graph.constant(f"{name}.codes", codes),
        graph.constant(f"{name}.scale", scale),
        graph.constant(f"{name}.zero", zero),
    ]
    weight = graph.name(f"{name}.float")
    graph.before(use.node, [graph.node("DequantizeLinear", parts, [weight], axis=0)])
    use.node.input[use.index] = weight
