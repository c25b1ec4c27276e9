"""A fit for one core, by a profile recorded on one core, beside the fit for this machine.

    python bench/edge.py MODEL DATA [OPTIONS OF penjing fit ...]

Both artifacts are then measured on one core, in turns, with one thread. Printed: size, quality with
its interval, milliseconds, and the median ratio of the two.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import penjing
from penjing.measure import Candidate, measure_files, median_ratio
from penjing.registry import lookup


def fit(model: str, data: str, options: list[str], output: Path) -> dict[str, object]:
    command = [sys.executable, "-m", "penjing", "fit", model, "--data", data, *options]
    done = subprocess.run(
        [*command, "-o", str(output), "--json"], stdout=subprocess.PIPE, check=False
    )
    if done.returncode not in (0, 3):
        sys.exit(done.returncode)
    return dict(json.loads(done.stdout))


def main() -> None:
    model, data, *options = sys.argv[1:]
    if "--runtime" not in options:
        options += ["--runtime", "onnxruntime"]
    with tempfile.TemporaryDirectory() as work:
        profile = Path(work) / "one.json"
        record = [sys.executable, "-m", "penjing", "measure", "--profile", str(profile)]
        subprocess.run(["taskset", "-c", "0", *record], stdout=subprocess.DEVNULL, check=True)
        ways = {"here": options, "one core": [*options, "--device", str(profile)]}
        found = {name: fit(model, data, own, Path(work) / name) for name, own in ways.items()}
        # The workers are children of this process and have its one core.
        os.sched_setaffinity(0, {0})
        file = str(lookup("runtimes", "onnxruntime", "file"))
        example = penjing.load(f"{work}/here")
        files = [Candidate(Path(work) / name / file, "onnxruntime", 1) for name in ways]
        here, one = measure_files(files, example, threads=1)
        for name, measured in (("here", here), ("one core", one)):
            table, drop = found[name], found[name]["drop"]
            sys.stdout.write(
                f"{name}: met {table['met']}, {measured.measurement.size_bytes / 1e6:.2f} MB, "
                f"{measured.measurement.latency_ms.median:.2f} ms on one core, drop {drop}\n"
            )
        sys.stdout.write(f"for one core / for here: {median_ratio(here, one):.3f}x as fast\n")


if __name__ == "__main__":
    main()
