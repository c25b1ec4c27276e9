"""One technique from Python: 8-bit weights, saved, loaded again and compared.

python examples/one_technique.py MODEL CALIBRATION EVALUATION OUTPUT
"""

from __future__ import annotations

import sys

import penjing


def main(model: str, calibration: str, evaluation: str, output: str) -> None:
    """Quantize `model` into the folder `output`."""
    original = penjing.load(model)
    small = penjing.quantize(original, bits=8, data=calibration)
    penjing.save(small, output, to=["onnx"])  # refused unless the file computes the same

    again = penjing.load(output)
    print(type(again.module).__name__, f"{again.stored_bits():.2f} bits a weight")
    for name, candidate in (("before", original), ("after", again)):
        found = penjing.evaluate(candidate, evaluation)
        print(name, found["metric"], f"{found['value']:.4f}, {found['samples']} samples")


if __name__ == "__main__":
    main(*sys.argv[1:])
