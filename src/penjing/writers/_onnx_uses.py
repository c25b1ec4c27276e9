"""Where a parameter is used in an exported graph.

The exporter transposes and renames weights, and merges equal ones into one initializer. So a
use is known by the module its node came from, checked by content; a node from elsewhere (a
tied weight, a functional call) by content alone, where equal content is equal arithmetic.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import numpy_helper

from penjing.model import Model

__all__ = ["Use", "find_uses"]

_WEIGHT_INDEX = {"MatMul": 1, "Gemm": 1, "Conv": 1, "Gather": 0}


@dataclass(frozen=True, eq=False)
class Use:
    """One read of a parameter.

    Attributes:
        node: the node that reads it, in the graph searched.
        index: which input of the node.
        transposed: whether the initializer holds the transpose, [in, out].
        module: path of the module the node came from, "" when unknown.
    """

    node: onnx.NodeProto
    index: int
    transposed: bool
    module: str


def find_uses(proto: onnx.ModelProto, model: Model) -> dict[str, list[Use]]:
    """The uses of every matrix or convolution kernel, by parameter path.

    A tied parameter goes by its first name. A parameter that is computed with before it is
    used, or used by another kind of node, is not found.
    """
    first = {id(p): name for name, p in model.parameters()}
    owner = {
        name.rpartition(".")[0]: first[id(p)]
        for name, p in model.module.named_parameters(remove_duplicate=False)
        if name.endswith("weight") and p.ndim >= 2
    }
    arrays = {n: p.detach().numpy() for n, p in model.parameters() if p.ndim >= 2}
    stored = {t.name: t for t in proto.graph.initializer}
    by_content: dict[bytes, tuple[str, bool]] = {}
    found: dict[str, list[Use]] = {}
    for node in proto.graph.node:
        index = _WEIGHT_INDEX.get(node.op_type)
        if index is None or node.input[index] not in stored:
            continue
        value = numpy_helper.to_array(stored[node.input[index]])
        if value.ndim < 2:
            continue
        module = next((m.value for m in node.metadata_props if m.key == "module"), "")
        name = owner.get(module)
        match = None
        if name is not None:
            match = _compare(value, arrays[name])
        if match is None:
            if not by_content:
                by_content = _digests(arrays)
            name, match = by_content.get(_digest(value), (None, None))
        if name is not None and match is not None:
            found.setdefault(name, []).append(Use(node, index, match, module))
    return found


def _compare(value: np.ndarray, array: np.ndarray) -> bool | None:
    """False: equal, True: equal to the transpose, None: neither."""
    if value.shape == array.shape and np.array_equal(value, array):
        return False
    if array.ndim == 2 and value.shape == array.shape[::-1] and np.array_equal(value, array.T):
        return True
    return None


def _digest(array: np.ndarray) -> bytes:
    content = np.ascontiguousarray(array)
    return hashlib.sha256(f"{content.shape}".encode() + content.tobytes()).digest()


def _digests(arrays: dict[str, np.ndarray]) -> dict[bytes, tuple[str, bool]]:
    table: dict[bytes, tuple[str, bool]] = {}
    for name, array in arrays.items():
        if array.ndim == 2:
            table.setdefault(_digest(array.T), (name, True))
    for name, array in arrays.items():
        table[_digest(array)] = (name, False)
    return table
