"""OpenVINO on the CPU: float32 arithmetic where nothing is quantized, tuned for latency.

`INFERENCE_PRECISION_HINT=f32` because the default computes in bfloat16 on processors that
can, which is another network than the one that was exported.

Weights of 1 to 8 bits without an input range are multiplied in int8: OpenVINO quantizes their
inputs on the fly in groups of 32 (its default, stated here), as onnxruntime's MatMulNBits does
at accuracy level 4. Measured on MiniLM: 1.7x the speed, cosine 0.9981 instead of 0.9987.
"""

from __future__ import annotations

import contextlib
import ctypes
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import ClassVar

import numpy as np

from penjing.errors import InputError, UsageError

__all__ = ["Session", "file", "open"]

file = "openvino"
"""Name of the exported file or folder in an artifact."""


class _Stack(ctypes.Structure):
    """`stack_t` of sigaltstack(2)."""

    _fields_: ClassVar = [
        ("place", ctypes.c_void_p), ("flags", ctypes.c_int), ("size", ctypes.c_size_t),
    ]  # fmt: skip


@contextlib.contextmanager
def _signal_stack_kept() -> Iterator[None]:
    """Put this thread's stack for signal handlers back as it was.

    Every plugin sets one of its own and, closed, puts back the one it found: with several, one
    that is freed by then. The next Ctrl-C ended the process with SIGSEGV.
    """
    change = getattr(ctypes.CDLL(None), "sigaltstack", None) if sys.platform == "linux" else None
    was = _Stack()
    known = change is not None and change(None, ctypes.byref(was)) == 0
    try:
        yield
    finally:
        if change is not None and known:
            change(ctypes.byref(was), None)


class Session:
    """A compiled model and its one inference request.

    Attributes:
        inputs: shape of each input by name, None for a free size.
    """

    def __init__(self, path: Path, threads: int) -> None:
        import openvino as ov

        options = {
            "INFERENCE_PRECISION_HINT": "f32",
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_NUM_THREADS": threads,
            "DYNAMIC_QUANTIZATION_GROUP_SIZE": "32",
        }
        try:
            with _signal_stack_kept():
                self.compiled = ov.Core().compile_model(path, "CPU", options)
        except RuntimeError as error:
            lines = [line for line in str(error).splitlines() if line.strip()] or [
                "no reason given"
            ]
            raise InputError(f"OpenVINO cannot read {path}", got=lines[-1].strip()) from error
        self.request = self.compiled.create_infer_request()
        self.inputs: dict[str, tuple[int | None, ...]] = {}
        self._types = {}
        for port in self.compiled.inputs:
            sizes = port.get_partial_shape()
            self.inputs[port.get_any_name()] = tuple(
                n.get_length() if n.is_static else None for n in sizes
            )
            self._types[port.get_any_name()] = port.get_element_type().to_dtype()

    def run(self, batch: Mapping[str, np.ndarray]) -> np.ndarray:
        """The one output, of the inputs named as in the exported file.

        Raises:
            InputError: an input is missing or has a wrong shape.
        """
        if missing := sorted(set(self._types) - set(batch)):
            raise InputError(
                f"input {missing[0]} is missing", got=sorted(batch), allowed=sorted(self._types)
            )
        inputs = {name: np.asarray(batch[name], dtype) for name, dtype in self._types.items()}
        for name, sizes in self.inputs.items():
            # OpenVINO itself takes a wrong size without an error.
            got = inputs[name].shape
            fits = len(got) == len(sizes) and all(
                want in (None, size) for want, size in zip(sizes, got, strict=True)
            )
            if not fits:
                raise InputError(f"shape of input {name}", got=got, allowed=sizes)
        try:
            outputs = self.request.infer(inputs)
        except RuntimeError as error:
            last = str(error).strip().splitlines()[-1]
            raise InputError("OpenVINO cannot run this batch", got=last) from error
        return np.array(outputs[0])


def open(path: Path, *, threads: int) -> Session:
    """Compile `path`, an `.xml` or a folder that holds `model.xml`.

    Raises:
        UsageError: OpenVINO is not installed.
        InputError: no such file, or not a model.
    """
    file = path / "model.xml" if path.is_dir() else path
    if not file.is_file():
        raise InputError("no such OpenVINO model", got=file, allowed="a folder with model.xml")
    try:
        return Session(file, threads)
    except ImportError as error:
        raise UsageError(
            "OpenVINO cannot be imported", got=error, next="pip install 'penjing[openvino]'"
        ) from error
