"""NNCF's post-training quantization of an OpenVINO IR; run by bench/w8a8.py.

    python nncf_int8.py MODEL.xml SAMPLES.npz OUT.xml '{"fast_bias_correction": true, ...}'

SAMPLES as samples.py has them. The options are those of
`nncf.quantize`; `overflow_fix` is one of its advanced parameters. Prints a line of JSON.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import nncf
import openvino as ov
from samples import read


def main(model: str, data: str, out: str, text: str) -> None:
    options: dict[str, Any] = json.loads(text)
    advanced = nncf.AdvancedQuantizationParameters()
    if fix := options.pop("overflow_fix", None):
        advanced.overflow_fix = nncf.OverflowFix(fix)
    found = read(data)
    quantized = nncf.quantize(
        ov.Core().read_model(model),
        nncf.Dataset(found),
        model_type=nncf.ModelType.TRANSFORMER,
        subset_size=len(found),
        advanced_parameters=advanced,
        **options,
    )
    ov.save_model(quantized, out, compress_to_fp16=False)
    print(json.dumps({"tool": "nncf", "version": nncf.__version__}))


if __name__ == "__main__":
    main(*sys.argv[1:])
