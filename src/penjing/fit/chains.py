"""A chain of distinct linear layers x @ W1 @ W2 @ ..., in any number format, for any runtime.

The layers alternate between [in, out] and [out, in]; the files come from the same code that
exports a model. What a runtime takes for a layer is the time of the chain over its layers.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from penjing.fit.space import Format
from penjing.model import Model, Source
from penjing.planes import IntegerPlanes, Scheme
from penjing.quantizers import rtn
from penjing.recipe import ActivationRange
from penjing.registry import lookup
from penjing.writers._onnx_blocks import place
from penjing.writers._onnx_edit import Graph
from penjing.writers._onnx_integer import Layer, place_matrices
from penjing.writers._onnx_uses import Use

__all__ = ["inputs", "weights", "write"]

# Inputs of the chain are normal with variance 1; 4 sigma either side are representable.
_RANGE = ActivationRange(8 / 255, 128)


def inputs(tokens: int, width: int, runtime: str) -> dict[str, np.ndarray]:
    """What `write`'s file is given: x [tokens, in]; a program takes it as one sample."""
    x = np.random.default_rng(1).standard_normal((tokens, width), np.float32)
    return {"x": x[None] if runtime == "executorch" else x}


def weights(inputs: int, outputs: int) -> list[np.ndarray]:
    """An even number of distinct weights [out, in], [in, out], ...; about 2 M numbers in all."""
    random = np.random.default_rng(0)
    pairs = max(1, min(4, 1_000_000 // (inputs * outputs)))
    return [
        random.standard_normal(shape, np.float32) / np.float32(shape[1] ** 0.5)
        for _ in range(pairs)
        for shape in ((outputs, inputs), (inputs, outputs))
    ]


def _planes(weight: np.ndarray, form: Format) -> IntegerPlanes | None:
    if form.options is None:
        return None
    options = {k: v for k, v in form.options if k in ("bits", "group", "symmetric")}
    return rtn.fit(torch.from_numpy(weight), Scheme(**options))


def _range(form: Format) -> ActivationRange | None:
    return _RANGE if "activations" in dict(form.options or ()) else None


def write(
    weights: list[np.ndarray], form: Format, runtime: str, path: Path, *, tokens: int = 128
) -> None:
    """The chain of `weights` in a format, as a runtime's file at `path`.

    Args:
        tokens: rows of the inputs, where a file has fixed sizes.

    Raises:
        PenjingError: the runtime has no such format, or is not installed.
    """
    planes = [_planes(weight, form) for weight in weights]
    # The float graph holds what the integers stand for, as an edited model's does.
    values = [
        weight if part is None else part.dequantize().numpy()
        for weight, part in zip(weights, planes, strict=True)
    ]
    if runtime == "executorch":
        _write_program(weights, values, form, tokens, path)
        return
    proto = _chain(values)
    if runtime == "openvino":
        from penjing.writers import openvino as writer

        ov = writer.require()
        source = path.parent / "float.onnx"
        onnx.save(proto, source)
        graph = ov.convert_model(source)
        if form.options is not None:
            parts = zip(values, planes, strict=True)
            found = [writer.Weight(f"{i}", v, p, _range(form)) for i, (v, p) in enumerate(parts)]
            writer.compress(graph, found)
        path.mkdir()
        ov.save_model(graph, path / "model.xml", compress_to_fp16=False)
        return
    graph = Graph(proto)
    layers = []
    for index, part in enumerate(planes):
        if part is None:
            continue
        node = next(n for n in graph.nodes if f"w{index}" in n.input)
        use = Use(node, 1, True, "")
        found_range = _range(form)
        if found_range is None:
            place(graph, f"w{index}", part, [use])
        else:
            layers.append(Layer(f"w{index}", use, part, found_range))
    place_matrices(graph, layers)
    onnx.save(graph.finish(), path)


def _write_program(
    weights: list[np.ndarray],
    values: list[np.ndarray],
    form: Format,
    tokens: int,
    path: Path,
) -> None:
    """The chain as a network, for a writer that takes nothing else."""
    layers = nn.Sequential(*(nn.Linear(w.shape[1], w.shape[0], bias=False) for w in weights))
    example = {"x": torch.randn(1, tokens, weights[0].shape[1])}
    model = Model(layers.eval(), "tensor", example, Source("factory", "", ""))
    for index, (value, weight) in enumerate(zip(values, weights, strict=True)):
        layers[index].weight.data = torch.from_numpy(value)
        if (part := _planes(weight, form)) is not None:
            model.planes[f"{index}.weight"] = part
        if (found := _range(form)) is not None:
            model.activations[f"{index}"] = found
    lookup("writers", "executorch", "write")(model, path)


def _chain(weights: list[np.ndarray]) -> onnx.ModelProto:
    """x [tokens, in] @ W1.T @ W2.T ..., float32."""
    names = ["x", *(f"h{i}" for i in range(1, len(weights))), "output"]
    nodes = [
        helper.make_node("MatMul", [names[i], f"w{i}"], [names[i + 1]], f"product{i}")
        for i in range(len(weights))
    ]
    ends = [("x", weights[0].shape[1]), ("output", weights[-1].shape[0])]
    first, last = (
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["tokens", width])
        for name, width in ends
    )
    stored = [
        numpy_helper.from_array(np.ascontiguousarray(w.T), f"w{i}") for i, w in enumerate(weights)
    ]
    graph = helper.make_graph(nodes, "chain", [first], [last], stored)
    opset = [helper.make_opsetid("", 21)]
    return helper.make_model(graph, opset_imports=opset, ir_version=10)
