"""Rotated inputs in an ONNX graph: x Q^T as two small matrix products, see `penjing.rotation`.

    Mul signs, Reshape to [n, a, b], MatMul with R^T and with L, Reshape back

made once for all layers that read x; its constants once for all inputs of a size.
"""

from __future__ import annotations

import numpy as np
from onnx import numpy_helper

from penjing.rotation import Rotation
from penjing.writers._onnx_edit import Graph

__all__ = ["rotated"]


def rotated(graph: Graph, value: str, basis: Rotation) -> str:
    """The name of x Q^T for the value x [..., in]; its nodes stand before the first reader of x."""
    left, right = (factor.float().numpy() for factor in basis.factors)
    stem = f"rotation_{basis.size}"
    made = f"{value}.{stem}_{basis.seed}"
    if graph.writer(made) is not None:
        return made
    signs = _constant(graph, f"{stem}_{basis.seed}.signs", basis.signs.float().numpy())
    shape = _constant(graph, f"{stem}.shape", np.array([-1, len(left), len(right)]))
    signed, parts, within, across, size = (graph.name("rotation") for _ in range(5))
    nodes = [
        graph.node("Mul", [value, signs], [signed]),
        graph.node("Reshape", [signed, shape], [parts]),  # [n, a, b]
        graph.node("MatMul", [parts, _constant(graph, f"{stem}.right", right.T)], [within]),
        graph.node("MatMul", [_constant(graph, f"{stem}.left", left), within], [across]),
        graph.node("Shape", [value], [size]),
        graph.node("Reshape", [across, size], [made]),
    ]
    graph.before(graph.readers(value)[0], nodes)
    return made


def _constant(graph: Graph, stem: str, array: np.ndarray) -> str:
    name = f"{stem}_penjing"
    if name not in graph.constants:
        graph.constants[name] = numpy_helper.from_array(np.ascontiguousarray(array), name)
    return name
