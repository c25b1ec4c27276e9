"""onnxruntime's `quantize_static` after its own pre-processing; run by bench/w8a8.py.

The pre-processing is without symbolic shape inference, which fails on this graph ("Incomplete
symbolic shape inference"); its optimizer and the shape inference of ONNX run.

    python ort_static.py MODEL.onnx SAMPLES.npz OUT.onnx '{"per_channel": true, ...}'

SAMPLES as samples.py has them. The options are those of `quantize_static`, enumerations by name.
Prints a line of JSON.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from onnxruntime.quantization import (
    CalibrationDataReader,
    CalibrationMethod,
    QuantFormat,
    QuantType,
    quantize_static,
)
from onnxruntime.quantization.shape_inference import quant_pre_process
from samples import read

# Samples that a histogram is made of at once: all their activations are in memory.
_STRIDE = 40


class Reader(CalibrationDataReader):
    """Samples of a file, a part at a time.

    Histograms are made of arrays of one shape: samples go by length, and those of a stride are cut
    to its shortest.
    """

    def __init__(self, path: str) -> None:
        found = sorted(read(path), key=lambda sample: sample["input_ids"].shape[1])
        self.samples: list[dict[str, np.ndarray]] = []
        for start in range(0, len(found) // _STRIDE * _STRIDE, _STRIDE):  # whole strides alone
            length = found[start]["input_ids"].shape[1]
            stride = found[start : start + _STRIDE]
            self.samples += [{n: x[:, :length] for n, x in one.items()} for one in stride]
        self.rest = iter(self.samples)

    def __len__(self) -> int:
        return len(self.samples)

    def set_range(self, start_index: int, end_index: int) -> None:
        self.rest = iter(self.samples[start_index:end_index])

    def get_next(self) -> dict[str, np.ndarray] | None:
        return next(self.rest, None)


def main(model: str, data: str, out: str, text: str) -> None:
    options: dict[str, Any] = json.loads(text)
    for name, kind in (("activation_type", QuantType), ("weight_type", QuantType),
                       ("calibrate_method", CalibrationMethod)):  # fmt: skip
        if name in options:
            options[name] = kind[options[name]]
    extra = {"CalibStridedMinMax": _STRIDE} | options.pop("extra_options", {})
    with tempfile.TemporaryDirectory() as place:
        ready = Path(place) / "ready.onnx"
        quant_pre_process(model, ready, skip_symbolic_shape=True)
        quantize_static(
            ready, out, Reader(data), quant_format=QuantFormat.QDQ, extra_options=extra, **options
        )
    print(json.dumps({"tool": "onnxruntime", "version": onnxruntime.__version__}))


if __name__ == "__main__":
    main(*sys.argv[1:])
