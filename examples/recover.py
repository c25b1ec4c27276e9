"""Cut a quarter of the blocks, train what is left, and say what each was worth.

python examples/recover.py MODEL CALIBRATION EVALUATION OUTPUT
"""

from __future__ import annotations

import sys

import penjing


def main(model: str, calibration: str, evaluation: str, output: str) -> None:
    """Cut `model`, recover it into the folder `output`."""
    original = penjing.load(model)
    cut = penjing.cut(original, ratio=0.25, data=calibration)
    # Hidden states of every block that is left say more than the output alone; a run that steps
    # alone end gives the same bytes again.
    better = penjing.recover(cut, calibration, seconds=0.0, steps=40, lr=2e-4, hidden=1.0)
    penjing.save(better, output)
    for name, candidate in (("whole", original), ("cut", cut), ("recovered", better)):
        found = penjing.evaluate(candidate, evaluation)
        print(name, found["metric"], f"{found['value']:.4f}, {found['samples']} samples")


if __name__ == "__main__":
    main(*sys.argv[1:])
