"""Writer `onnx`: one model.onnx, opset 23, low-bit weights stored low-bit."""

from __future__ import annotations

from pathlib import Path

import onnx

from penjing.model import Model
from penjing.writers._onnx_graph import float_graph
from penjing.writers._onnx_uses import Use, find_uses

__all__ = ["Use", "find_uses", "float_graph", "write"]


def write(model: Model, path: Path) -> None:
    """Write `model` as ONNX to the file `path`."""
    onnx.save(float_graph(model), path)
