"""Runtime `onnxruntime`: run a model.onnx on the CPU with numpy alone."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from penjing.errors import InputError

__all__ = ["Session", "file", "open"]

file = "model.onnx"
"""Name of the exported file or folder in an artifact."""


class Session:
    """One loaded network.

    Attributes:
        inputs: shape of each input by name, None for a free size; a decoder's cache included.
    """

    def __init__(self, session: onnxruntime.InferenceSession) -> None:
        self._session = session
        self.inputs: dict[str, tuple[int | None, ...]] = {}
        self._types: dict[str, Any] = {}
        for value in session.get_inputs():
            self.inputs[value.name] = tuple(d if isinstance(d, int) else None for d in value.shape)
            self._types[value.name] = _TYPES[value.type]
        self._outputs = [value.name for value in session.get_outputs()]

    @property
    def cache(self) -> tuple[str, ...]:
        """Names of the cache inputs of a decoder, in the order of `step`'s second value."""
        return tuple(name for name in self.inputs if name.startswith("past_key_values."))

    def run(self, batch: Mapping[str, np.ndarray]) -> np.ndarray:
        """The output for one batch; a decoder starts from an empty cache.

        Raises:
            InputError: an input is missing, or the runtime refuses the shapes.
        """
        return self._run(batch, ["output"])[0]

    def step(
        self, batch: Mapping[str, np.ndarray], past: Mapping[str, np.ndarray] | None = None
    ) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """One decoder step: logits [batch, new, vocabulary] and the cache for the next step.

        `attention_mask` of the batch covers past and new tokens.
        """
        names = [f"present.{n.removeprefix('past_key_values.')}" for n in self.cache]
        output, *present = self._run({**batch, **(past or {})}, ["output", *names])
        return output, dict(zip(self.cache, present, strict=True))

    def _run(self, batch: Mapping[str, np.ndarray], outputs: list[str]) -> list[np.ndarray]:
        feed = {}
        for name, shape in self.inputs.items():
            if name in batch:
                feed[name] = np.ascontiguousarray(batch[name], dtype=self._types[name])
            elif name.startswith("past_key_values."):
                rows = len(next(iter(batch.values())))
                empty = (rows, shape[1] or 0, 0, shape[3] or 0)
                feed[name] = np.zeros(empty, self._types[name])
            else:
                raise InputError(
                    f"input {name} is missing", got=sorted(batch), allowed=sorted(self.inputs)
                )
        try:
            return list(self._session.run(outputs, feed))
        except Exception as error:
            raise InputError(
                "onnxruntime refuses the batch", got=" ".join(str(error).split())
            ) from error


_TYPES = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(double)": np.float64,
    "tensor(int64)": np.int64,
    "tensor(int32)": np.int32,
    "tensor(uint8)": np.uint8,
    "tensor(int8)": np.int8,
    "tensor(bool)": np.bool_,
}


def open(path: Path, *, threads: int) -> Session:
    """Load the file at `path` for `threads` threads.

    Raises:
        InputError: no such file, or not an ONNX model this runtime can run.
    """
    if not Path(path).is_file():
        raise InputError("no such ONNX file", got=path)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.log_severity_level = 4
    try:
        session = onnxruntime.InferenceSession(
            str(path), options, providers=["CPUExecutionProvider"]
        )
    except Exception as error:
        raise InputError(
            "onnxruntime cannot load the file", got=" ".join(str(error).split())
        ) from error
    return Session(session)
