"""Weight-only integers in onnxruntime's own operators.

    Linear      com.microsoft MatMulNBits             [rows, blocks, block * bits / 8] uint8
    Embedding   com.microsoft GatherBlockQuantized    [rows, in * bits / 8] uint8
    Conv        DequantizeLinear per output channel   [out, in, h, w] uint4 or uint8

with w = (code - zero) * scale per row and block. MatMulNBits rounds activations to int8 a
block (accuracy level 4, without which it is slower than float32). A matrix that is both
embedding and output layer is stored once.

Kernels have 2, 4 and 8 bits; a code of another width is stored in the next. Planes whose sum is
no uniform grid are products of their own that are added up, and what no integer zero point says
of the shift is a thin float product of each group's sum of inputs, see `_terms`.
"""

from __future__ import annotations

from dataclasses import dataclass

import ml_dtypes
import numpy as np
import onnx

from penjing.errors import ExportError
from penjing.planes import IntegerPlanes
from penjing.writers._onnx_edit import Graph
from penjing.writers._onnx_rotation import rotated
from penjing.writers._onnx_scales import grown, stored_scale
from penjing.writers._onnx_uses import Use
from penjing.writers._terms import Term, expressible, terms_of

__all__ = ["Blocks", "blocks_of", "place", "problem"]

# 2 bits with 16 or 256 inputs a block fall back to a kernel that is 100 times slower.
_SIZES = {2: (128, 64, 32), 4: (256, 128, 64, 32, 16), 8: (256, 128, 64, 32, 16)}
_ROW = 128  # of a scale for the whole row: smaller blocks round the inputs better


@dataclass(frozen=True, eq=False)
class Blocks:
    """A term in the layout of the operators.

    Attributes:
        codes: uint8 [rows, in].
        zero: uint8 [rows, groups], None where every one is 2**(bits - 1).
        scale: float32 [rows, groups].
        bits: stored width, 2, 4 or 8.
        size: inputs of a block.
        times: blocks of a group.
        count: blocks of a row.
    """

    codes: np.ndarray
    zero: np.ndarray | None
    scale: np.ndarray
    bits: int
    size: int
    times: int
    count: int


def problem(planes: IntegerPlanes, kind: str) -> str:
    """Why this cannot be stored for a node of `kind`; empty when it can."""
    if reason := expressible(planes):
        return reason
    if planes.rotation is not None and kind != "MatMul":
        return f"{planes.kind}, read by {kind}"
    whole = planes.group >= planes.inputs
    if kind == "Conv":
        return "" if whole else f"groups of {planes.group}; a convolution has one scale a channel"
    if not whole and planes.group % 16:
        return f"groups of {planes.group}; allowed: multiples of 16 or the whole row"
    return ""


def blocks_of(term: Term, *, table: bool = False) -> Blocks:
    """Lay out a term; `table`: for gathers alone, whose one kernel is as fast at every size."""
    bits, width = term.width, term.codes.shape[1]
    if term.group < width and term.group % 32 and not table:
        bits = max(bits, 4)
    sizes = _SIZES[4 if table else bits]
    if term.group >= width and table:
        size, times = max(16, 1 << (width - 1).bit_length()), 1
    elif term.group < width:
        size = next(n for n in sizes if term.group % n == 0)
        times = term.group // size
    else:
        near = [n for n in sizes if n <= _ROW]
        fallback = near[0] if width > near[0] // 2 else near[-1]
        size = next((n for n in near if width % n == 0), fallback)
        times = -(-width // size)
    count = -(-width // size)
    middle = 2 ** (bits - 1)
    zero = term.zero
    # Subnormal and zero scales have any zero point; only real ones have to be the middle.
    if zero.size and (zero == zero.flat[0]).all() and zero.flat[0] <= middle:
        shifted = term.codes.astype(np.int16) + (middle - int(zero.flat[0]))
        if shifted.max(initial=0) < 2**bits:
            codes = shifted.astype(np.uint8)
            return Blocks(codes, None, term.scale, bits, size, times, count)
    return Blocks(term.codes, zero, term.scale, bits, size, times, count)


def place(graph: Graph, name: str, planes: IntegerPlanes, uses: list[Use]) -> None:
    """Make every use of parameter `name` read its integers."""
    if not uses:
        return
    terms, rest = terms_of(planes)
    for use in uses:
        if use.node.op_type == "Conv":
            _kernel(graph, name, terms, rest, planes.shape, use)
    others = [u for u in uses if u.node.op_type != "Conv"]
    if planes.basis is not None:
        for use in others:
            if use.node.op_type == "Gather":
                raise ExportError(f"{name} is {planes.kind}, and read as a table")
            use.node.input[0] = rotated(graph, use.node.input[0], planes.basis)
    if not others:
        return
    matrices = any(u.node.op_type != "Gather" for u in others)
    tables = [
        _stored(graph, name, blocks_of(t, table=not matrices), planes.scale_bits, matrices)
        for t in terms
    ]
    spare = None
    if rest is not None:
        spare = (stored_scale(graph, f"{name}.shift", rest, planes.scale_bits), terms[0].group)
    for use in others:
        if use.node.op_type == "Gather":
            _gather(graph, use.node, tables, spare)
        else:
            _matmul(graph, use.node, tables, spare)


@dataclass(frozen=True, eq=False)
class _Table:
    """Stored blocks: names of codes, scale and zero (or ""), the table for Gather."""

    blocks: Blocks
    codes: str
    scale: str
    zero: str
    blocked: bool

    @property
    def inputs(self) -> list[str]:
        return [self.codes, self.scale, *([self.zero] if self.zero else [])]


def _stored(graph: Graph, name: str, blocks: Blocks, scale_bits: int, blocked: bool) -> _Table:
    rows, width = blocks.codes.shape
    count = blocks.count
    codes = np.pad(blocks.codes, ((0, 0), (0, count * blocks.size - width if blocked else 0)))
    packed = _pack(codes, blocks.bits)  # [rows, bytes]
    if blocked:
        packed = packed.reshape(rows, count, -1)
    scale = stored_scale(graph, f"{name}.scale", blocks.scale, scale_bits)
    scale = grown(graph, scale, rows, blocks.scale.shape[1], blocks.times, count)
    zero = ""
    if blocks.zero is not None:
        per = 8 // blocks.bits
        if blocks.zero.shape[1] == 1:
            # All fields of a byte are the same: one byte a row, repeated at load.
            byte = _pack(np.repeat(blocks.zero, per, axis=1), blocks.bits)
            held = graph.constant(f"{name}.zero", byte)
            zero = grown(graph, held, rows, 1, -(-count // per), -(-count // per))
        else:
            repeated = np.repeat(blocks.zero, blocks.times, axis=1)[:, :count]
            zero = graph.constant(f"{name}.zero", _pack(repeated, blocks.bits))
    held = graph.constant(f"{name}.codes", packed)
    return _Table(blocks, held, scale, zero, blocked)


def _pack(codes: np.ndarray, bits: int) -> np.ndarray:
    """[rows, n] to [rows, ceil(n * bits / 8)], low bits first."""
    per = 8 // bits
    padded = np.pad(codes, ((0, 0), (0, -codes.shape[1] % per)))
    lanes = padded.reshape(len(codes), -1, per) << (np.arange(per, dtype=np.uint8) * bits)
    packed: np.ndarray = np.bitwise_or.reduce(lanes, axis=-1).astype(np.uint8)
    return packed


def _added(graph: Graph, parts: list[str], output: str) -> list[onnx.NodeProto]:
    """Nodes that add up `parts` to `output`."""
    made, total = [], parts[0]
    for part in parts[1:]:
        name = output if part is parts[-1] else graph.name("sum")
        made.append(graph.node("Add", [total, part], [name]))
        total = name
    return made


def _matmul(
    graph: Graph, node: onnx.NodeProto, tables: list[_Table], spare: tuple[str, int] | None
) -> None:
    bias = node.input[2] if node.op_type == "Gemm" and len(node.input) > 2 else ""
    count = len(tables) + (spare is not None) + bool(bias)
    made, parts = [], []
    for table in tables:
        rows, width = table.blocks.codes.shape
        output = node.output[0] if count == 1 else graph.name("matmul")
        made.append(
            graph.node(
                "MatMulNBits", [node.input[0], *table.inputs], [output], "com.microsoft",
                K=width, N=rows, bits=table.blocks.bits, block_size=table.blocks.size,
                accuracy_level=4,
            )
        )  # fmt: skip
        parts.append(output)
    if spare is not None:
        sums, shift = graph.name("sums"), graph.name("shift")
        members = _members(graph, tables[0].blocks.codes.shape[1], spare[1])
        turned = graph.name("turned")
        made += [
            graph.node("MatMul", [node.input[0], members], [sums]),
            graph.node("Transpose", [spare[0]], [turned], perm=[1, 0]),
            graph.node("MatMul", [sums, turned], [shift]),
        ]
        parts.append(shift)
    if bias:
        parts.append(bias)
    graph.replace([node], [*made, *_added(graph, parts, node.output[0])])


def _members(graph: Graph, width: int, group: int) -> str:
    """The constant [in, groups] that is 1 where an input is of a group; one for all layers."""
    name = f"members_{width}_{group}_penjing"
    if name not in graph.constants:
        member = np.arange(width)[:, None] // group == np.arange(-(-width // group))
        made = graph.constant(name, member.astype(np.float32))
        tensor = graph.constants.pop(made)
        tensor.name = name
        graph.constants[name] = tensor
    return name


def _gather(
    graph: Graph, node: onnx.NodeProto, tables: list[_Table], spare: tuple[str, int] | None
) -> None:
    count = len(tables) + (spare is not None)
    made, parts = [], []
    for table in tables:
        blocks = table.blocks
        rows, width = blocks.codes.shape
        output = node.output[0] if count == 1 else graph.name("gather")
        data, padded = table.codes, table.blocked and blocks.count * blocks.size != width
        if table.blocked:
            shape = graph.constant("shape", np.array([rows, -1]))
            data = graph.name("table")
            made.append(graph.node("Reshape", [table.codes, shape], [data]))
        inputs = [data, node.input[1], *table.inputs[1:]]
        whole = graph.name("gather") if padded else output
        made.append(
            graph.node(
                "GatherBlockQuantized", inputs, [whole], "com.microsoft", bits=blocks.bits,
                block_size=blocks.size, gather_axis=0, quantize_axis=1,
            )
        )  # fmt: skip
        if padded:
            ends = [graph.constant("end", np.array([n])) for n in (0, width, -1)]
            made.append(graph.node("Slice", [whole, *ends], [output]))
        parts.append(output)
    if spare is not None:
        picked, shift, turned = graph.name("picked"), graph.name("shift"), graph.name("turned")
        members = _members(graph, tables[0].blocks.codes.shape[1], spare[1])
        made += [
            graph.node("Gather", [spare[0], node.input[1]], [picked]),
            graph.node("Transpose", [members], [turned], perm=[1, 0]),
            graph.node("MatMul", [picked, turned], [shift]),
        ]
        parts.append(shift)
    graph.replace([node], [*made, *_added(graph, parts, node.output[0])])


def _kernel(
    graph: Graph,
    name: str,
    terms: list[Term],
    rest: np.ndarray | None,
    shape: tuple[int, ...],
    use: Use,
) -> None:
    made, parts = [], []
    for term in terms:
        stored = ml_dtypes.uint4 if term.width <= 4 else np.uint8
        inputs = [
            graph.constant(f"{name}.codes", term.codes.reshape(shape).astype(stored)),
            graph.constant(f"{name}.scale", term.scale.reshape(-1)),
            graph.constant(f"{name}.zero", term.zero.reshape(-1).astype(stored)),
        ]
        parts.append(graph.name(f"{name}.float"))
        made.append(graph.node("DequantizeLinear", inputs, [parts[-1]], axis=0))
    if rest is not None:
        column = (-1, *[1] * (len(shape) - 1))
        parts.append(graph.constant(f"{name}.shift", rest.reshape(column)))
    output = parts[0] if len(parts) == 1 else graph.name(f"{name}.float")
    graph.before(use.node, [*made, *_added(graph, parts, output)])
    use.node.input[use.index] = output
