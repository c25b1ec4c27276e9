"""OpenVINO's IR (model.xml and model.bin), quantized weights stored in their own bits.

The float network comes from the ONNX graph; then each quantized weight's constant becomes

    w = (Convert(codes) - zero_point) * scale        u1, u2, u4 or u8 codes

which OpenVINO keeps low-bit at run time (its weight decompression, also of an embedding's
Gather). A module with an `ActivationRange` and symmetric 8-bit weights becomes

    FakeQuantize(x, 256 levels) @ (Convert(i8) * scale)

the form that OpenVINO's low-precision transformations turn into an int8 kernel.
A layer's output with a range is a FakeQuantize behind its bias.
A rotated weight multiplies the rotated input, made once for all that read it. Planes beyond the
first are added up; that form is small on disk and runs in float32.
"""

from __future__ import annotations

import hashlib
import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from penjing.errors import ExportError, UsageError
from penjing.model import Model
from penjing.planes import IntegerPlanes
from penjing.recipe import ActivationRange
from penjing.rotation import Rotation
from penjing.writers._onnx_graph import float_graph, projected
from penjing.writers._onnx_uses import find_uses

__all__ = ["Weight", "check", "compress", "weights_of", "write"]

# Stored width -> the type that holds it; a code of 3 bits is stored in 4, of 5 to 7 in 8.
_WIDTHS = (1, 2, 4, 8)
_PRODUCTS = ("MatMul", "Convolution", "GroupConvolution")


@dataclass(frozen=True, eq=False)
class Weight:
    """A parameter to be found in the float graph by its content.

    Attributes:
        path: of the parameter.
        value: float32, the values the float graph holds.
        planes: its integers, or None.
        activation: range of its module's input, or None.
    """

    path: str
    value: np.ndarray
    planes: IntegerPlanes | None
    activation: ActivationRange | None


def weights_of(model: Model) -> list[Weight]:
    """The quantized weights of `model` and the weights of modules with quantized inputs."""
    parameters = dict(model.module.named_parameters(remove_duplicate=False))
    paths = dict.fromkeys([*model.planes, *(f"{module}.weight" for module in model.activations)])
    return [
        Weight(
            path,
            np.ascontiguousarray(parameters[path].detach().float().numpy()),
            model.planes.get(path),
            model.activations.get(path.rpartition(".")[0]),
        )
        for path in paths
    ]


def check(model: Model) -> list[str]:
    """What of `model` this writer cannot express, a line each; empty when it can all."""
    lines = [
        f"{name}: {planes.kind}"
        for name, planes in model.planes.items()
        if planes.tables is not None or max(planes.bits) > 8
    ]
    if model.interface == "causal":
        lines.append("a decoder with a KV cache")
    return lines + projected(model)


def write(model: Model, folder: Path) -> None:
    """Write `folder/model.xml` and `folder/model.bin`.

    Inputs are named as in `model.example`, batch and length dynamic; the output is `output`.

    Raises:
        UsageError: OpenVINO is not installed, or the network is a causal decoder
            (its KV cache is not written yet), or a weight is made of table entries.
        ExportError: a quantized weight is not in the float graph.
    """
    ov = require()
    if lines := check(model):
        raise UsageError(
            f"OpenVINO cannot express {lines[0]}",
            got=f"{len(lines)} such" if len(lines) > 1 else None,
            allowed="encoders and image networks; planes of at most 8 bits",
            next="export --to onnx, or load the artifact in Python",
        )
    graph = float_graph(model)
    uses = [use for found in find_uses(graph, model).values() for use in found]
    modules = {use.node.name: use.module for use in uses if use.module}
    converted = _convert(ov, graph)
    compress(converted, weights_of(model), modules)
    _round_outputs(converted, model, modules)
    folder.mkdir(parents=True, exist_ok=True)
    ov.save_model(converted, folder / "model.xml", compress_to_fp16=False)


def require() -> Any:
    """The `openvino` package.

    Raises:
        UsageError: it is not installed.
    """
    try:
        import openvino
    except ImportError as error:
        raise UsageError(
            "OpenVINO cannot be imported", got=error, next="pip install 'penjing[openvino]'"
        ) from error
    return openvino


def _convert(ov: Any, graph: Any) -> Any:
    """ONNX ModelProto to ov.Model, by way of a file so that no 2 GB limit holds."""
    import tempfile

    import onnx

    with tempfile.TemporaryDirectory() as place:
        path = Path(place) / "model.onnx"
        onnx.save(graph, path, save_as_external_data=True, location="model.data")
        return ov.convert_model(path)


def compress(graph: Any, weights: list[Weight], modules: Mapping[str, str] | None = None) -> None:
    """Put the integers of `weights` into an `openvino.Model`, in place.

    Args:
        graph: float32, the weights as constants, straight or transposed.
        weights: what to put in.
        modules: path of the module by name of the node that multiplies; needed where weights
            of equal content have inputs of different ranges.

    Raises:
        ExportError: a weight is not among the constants, or a range cannot be told.
    """
    constants: dict[bytes, list[Any]] = defaultdict(list)
    for node in graph.get_ordered_ops():
        if node.get_type_name() == "Constant" and str(node.get_element_type().to_string()) == "f32":
            constants[_digest(node.data)].append(node)
    groups: dict[bytes, list[Weight]] = defaultdict(list)
    for weight in weights:
        groups[_digest(weight.value)].append(weight)
    inputs: dict[tuple[Any, ...], Any] = {}
    for digest, twins in groups.items():
        nodes, straight = constants.get(digest), True
        if not nodes and twins[0].value.ndim == 2:
            nodes, straight = constants.get(_digest(twins[0].value.T)), False
        if not nodes:
            raise ExportError("a quantized weight is not in the float graph", got=twins[0].path)
        planes = next((twin.planes for twin in twins if twin.planes is not None), None)
        for node in nodes:
            for user in node.output(0).get_target_inputs():
                activation = None
                if user.get_node().get_type_name() in _PRODUCTS and user.get_index() == 1:
                    # An ONNX Gemm becomes a product of this name and a sum.
                    name = user.get_node().get_friendly_name().removesuffix("/WithoutBiases")
                    activation = _activation(twins, (modules or {}).get(name))
                _replace(user, planes, activation, straight, inputs)
    graph.validate_nodes_and_infer_types()


def _round_outputs(graph: Any, model: Model, modules: Mapping[str, str]) -> None:
    """FakeQuantize behind the layers whose outputs have a range, behind their biases."""
    from openvino import opset13 as op

    made = set()
    for node in graph.get_ordered_ops():
        path = modules.get(node.get_friendly_name().removesuffix("/WithoutBiases"))
        if path not in model.outputs or node.get_type_name() not in _PRODUCTS:
            continue
        readers = list(node.output(0).get_target_inputs())
        if len(readers) == 1 and readers[0].get_node().get_type_name() == "Add":
            node = readers[0].get_node()
            readers = list(node.output(0).get_target_inputs())
        low, high = (np.float32(end) for end in _limits(model.outputs[path]))
        rounded = op.fake_quantize(node.output(0), low, high, low, high, 256)
        for reader in readers:
            reader.replace_source_output(rounded.output(0))
        made.add(path)
    if missing := sorted(set(model.outputs) - made):
        raise ExportError("a layer with 8-bit outputs is not in the float graph", got=missing[0])
    graph.validate_nodes_and_infer_types()


def _activation(twins: list[Weight], module: str | None) -> ActivationRange | None:
    """The input range at one use of weights of equal content."""
    for twin in twins:
        if module is not None and twin.path == f"{module}.weight":
            return twin.activation
    if len({twin.activation and twin.activation.key for twin in twins}) > 1:
        raise ExportError("equal weights with unequal input ranges", got=twins[0].path)
    return twins[0].activation


def _replace(
    user: Any,
    planes: IntegerPlanes | None,
    activation: ActivationRange | None,
    straight: bool,
    inputs: dict[tuple[Any, ...], Any],
) -> None:
    """Feed one consumer of a weight's constant with its low-bit form and quantized input."""
    from openvino import opset13 as op

    target = list(user.get_source_output().get_shape())
    if planes is not None:
        signed = activation is not None
        if straight:
            value = low_bit(planes, target, signed=signed)
        else:
            value = op.transpose(low_bit(planes, target[::-1], signed=signed), np.array([1, 0]))
        user.replace_source_output(value.output(0))
    if planes is not None and planes.basis is not None:
        node = user.get_node()
        if node.get_type_name() != "MatMul" or user.get_index() != 1 or activation is not None:
            raise ExportError("a rotated weight of other than a product of floats", got=node)
        data = node.input(0)
        source = data.get_source_output()
        turned = (source.get_node().get_name(), source.get_index(), planes.basis)
        if turned not in inputs:
            inputs[turned] = rotated(source, planes.basis)
        data.replace_source_output(inputs[turned].output(0))
    if activation is not None and activation.scale:
        data = user.get_node().input(0)
        source = data.get_source_output()
        low, high = _limits(activation)
        key = (source.get_node().get_name(), source.get_index(), activation.key)
        if key not in inputs:
            if (factor := activation.factor) is not None:
                # Fused into what comes before; FakeQuantize itself takes no range a channel.
                source = op.multiply(source, op.constant(factor.numpy())).output(0)
            ends = [np.float32(value) for value in (low, high, low, high)]
            inputs[key] = op.fake_quantize(source, *ends, 256)
        data.replace_source_output(inputs[key].output(0))


def rotated(source: Any, basis: Rotation) -> Any:
    """The subgraph that computes x Q^T of an output x [..., in]."""
    from openvino import opset13 as op

    left, right = (factor.float().numpy() for factor in basis.factors)
    node = op.multiply(source, op.constant(basis.signs.float().numpy()))
    node = op.reshape(node, np.array([-1, len(left), len(right)]), False)  # [n, a, b]
    node = op.matmul(node, op.constant(right), False, True)
    node = op.matmul(op.constant(left), node, False, False)
    return op.reshape(node, op.shape_of(source), False)


def low_bit(planes: IntegerPlanes, shape: list[int], *, signed: bool = False) -> Any:
    """The subgraph that computes `planes.dequantize()`, in the basis of the planes.

    Args:
        planes: the integers.
        shape: of the result; the product of its first few sizes is out.
        signed: store signed codes as i8 where the zero point is in the middle (int8 kernels
            take no others).
    """
    from openvino import opset13 as op

    out, inputs = planes.codes.shape[1:]
    if short := -inputs % planes.group if planes.group < inputs else 0:
        # The last group is shorter: pad it to a whole one, cut the result.
        padded = torch.nn.functional.pad(planes.codes, (0, short))
        whole = IntegerPlanes(padded, planes.bits, planes.scale, planes.shift, planes.group)
        begin, end, one = (np.array([n]) for n in (0, inputs, 1))
        cut = op.slice(low_bit(whole, [out, inputs + short]), begin, end, one, one)
        return cut if shape == [out, inputs] else op.reshape(cut, np.array(shape), False)
    groups = inputs // planes.group if planes.group < inputs else 1
    full = [out, groups, inputs // groups] if groups > 1 else shape
    leading = next(k for k in range(1, len(full) + 1) if math.prod(full[:k]) == out)
    column = [*full[:leading], *[1] * (len(full) - leading)]
    if groups > 1:
        column[1] = groups
    scale = planes.scale.numpy().astype(np.float32).reshape(-1, *column)
    shift = planes.shift.numpy().astype(np.float32).reshape(column)
    codes = planes.codes.numpy().reshape(-1, *full)
    if len(codes) == 1 and (scale != 0).all():
        node = _affine(codes[0], planes.bits[0], scale[0], shift, signed)
    else:
        node = op.constant(shift)
        for plane, bits, factor in zip(codes, planes.bits, scale, strict=True):
            term = op.multiply(op.convert(_constant(plane, bits), "f32"), op.constant(factor))
            node = op.add(node, term)
    return op.reshape(node, np.array(shape), False) if groups > 1 else node


def _affine(
    codes: np.ndarray, bits: float, scale: np.ndarray, shift: np.ndarray, signed: bool
) -> Any:
    """(codes - zero_point) * scale, with an integer zero point where it is one."""
    from openvino import opset13 as op

    zero = -shift / scale
    near = np.rint(zero)
    if np.abs(zero - near).max() < 1e-3:
        zero = near
    half = 2 ** (int(bits) - 1)
    if signed and bits in (7, 8) and (zero == half).all():
        node = op.convert(op.constant((codes.astype(np.int16) - half).astype(np.int8)), "f32")
        return op.multiply(node, op.constant(scale))
    if (zero == near).all() and zero.min() >= 0 and zero.max() < 2 ** _width(bits):
        points = op.convert(_constant(zero.astype(np.uint8), bits), "f32")
    else:
        points = op.constant(zero)
    node = op.convert(_constant(codes, bits), "f32")
    return op.multiply(op.subtract(node, points), op.constant(scale))


def _width(bits: float, columns: int = 8) -> int:
    # OpenVINO 2026.4 multiplies wrongly by rows of 2-bit codes that end amid a byte.
    return next(width for width in _WIDTHS if width >= bits and not columns * width % 8)


def _constant(codes: np.ndarray, bits: float) -> Any:
    """Unsigned codes as an OpenVINO constant of the narrowest type that holds them."""
    import openvino as ov
    from openvino import opset13 as op

    width = _width(bits, codes.shape[-1]) if codes.size > len(codes) else _width(bits)
    if width == 8:
        return op.constant(np.ascontiguousarray(codes, dtype=np.uint8))
    per = 8 // width
    flat = np.pad(codes.ravel(), (0, -codes.size % per)).reshape(-1, per)
    # u4 fills a byte from its low end; u1 from its high end, as OpenVINO lays them out.
    order = np.arange(per)[::-1] if width == 1 else np.arange(per)
    packed = (flat << (order * width)).sum(1).astype(np.uint8)
    kind = {1: ov.Type.u1, 2: ov.Type.u2, 4: ov.Type.u4}[width]
    tensor = ov.Tensor(packed, ov.Shape(list(codes.shape)), kind)
    return op.constant(tensor, shared_memory=False)


def _limits(activation: ActivationRange | None) -> tuple[float, float]:
    """Real values of codes 0 and 255; both zero for no range."""
    if activation is None:
        return (0.0, 0.0)
    zero = activation.zero_point
    return -zero * activation.scale, (255 - zero) * activation.scale


def _digest(value: np.ndarray) -> bytes:
    return hashlib.sha256(np.ascontiguousarray(value).tobytes()).digest()
