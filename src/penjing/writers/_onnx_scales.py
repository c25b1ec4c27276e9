"""Scales in an ONNX graph, in as few bytes as the planes have; the runtime unpacks them once.

    32 bits   a float32 constant
    16 bits   a float16 constant and Cast
    8 bits    uint8 codes and a step for every 64: Cast, Mul (see `penjing.scales`)

Everything here is computed from constants alone, so that onnxruntime folds it when it loads the
file and its kernels find plain constants to pack.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import torch

from penjing.scales import RUN, codes_of, round_scales, steps_of
from penjing.writers._onnx_edit import Graph

__all__ = ["grown", "stored_scale"]


def stored_scale(graph: Graph, stem: str, scale: np.ndarray, bits: int) -> str:
    """The name of a float32 value [rows, groups] that is exactly `scale`.

    Args:
        bits: 8 where they may be of double quantization; 16 bits are tried for all.
    """
    signed = bool((scale < 0).any())
    if bits == 8:
        whole = torch.from_numpy(scale).unsqueeze(0)
        if torch.equal(round_scales(whole, 8, signed=signed), whole):
            return _double(graph, stem, whole, signed)
    with np.errstate(over="ignore"):
        half = scale.astype(np.float16)
    if not np.array_equal(half.astype(np.float32), scale):
        return graph.constant(stem, scale)
    return _first(graph, stem, "Cast", [graph.constant(stem, half)], to=onnx.TensorProto.FLOAT)


def grown(graph: Graph, name: str, rows: int, groups: int, times: int, count: int) -> str:
    """The value [rows, groups] with each entry `times` times, cut to [rows, count]."""
    if times == 1 and groups == count:
        return name
    sizes = [np.array(n) for n in ([rows, groups, 1], [rows, groups, times], [rows, -1])]
    one, more, flat = (graph.constant("sizes", size) for size in sizes)
    made = _first(graph, name, "Reshape", [name, one])
    made = _first(graph, name, "Expand", [made, more])
    made = _first(graph, name, "Reshape", [made, flat])
    if groups * times == count:
        return made
    ends = [graph.constant("end", np.array([n])) for n in (0, count, 1)]
    return _first(graph, name, "Slice", [made, *ends])


def _double(graph: Graph, stem: str, scale: torch.Tensor, signed: bool) -> str:
    codes = codes_of(scale, signed=signed).flatten()
    step = steps_of(scale, signed=signed).float().reshape(-1, 1).numpy()  # [runs, 1]
    padded = np.pad(codes.numpy(), (0, len(step) * RUN - len(codes))).reshape(-1, RUN)
    names = [graph.constant(stem, padded)]
    wide = _first(graph, stem, "Cast", names, to=onnx.TensorProto.FLOAT)
    # bfloat16 in float32: the upper half of the bits; the few steps are not worth a Cast.
    value = _first(graph, stem, "Mul", [wide, graph.constant(stem, step)])
    flat = _first(graph, stem, "Reshape", [value, graph.constant("sizes", np.array([-1]))])
    if padded.size != len(codes):
        ends = [graph.constant("end", np.array([n])) for n in (0, len(codes))]
        flat = _first(graph, stem, "Slice", [flat, *ends])
    shape = graph.constant("sizes", np.array(scale.shape[1:]))
    return _first(graph, stem, "Reshape", [flat, shape])


def _first(graph: Graph, stem: str, kind: str, inputs: list[str], **attributes: Any) -> str:
    """A node of constants, placed behind others of its like, in front of all that run."""
    output = graph.name(stem)
    graph.early.append(graph.node(kind, inputs, [output], **attributes))
    return output
