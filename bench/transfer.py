"""A student of a quarter of its teacher's size on Fashion-MNIST: what each kind of transfer gives.

    python bench/transfer.py [--steps 120] [--seeds 3] [-o bench/results/transfer.md]

The teacher is `bench/fashion.py`'s ResNet-20, the student the same with half the channels, from
random numbers but where parameters are transferred. Every row makes as many steps on the same
images in batches of 128 (AdamW, a cosine); rows differ in nothing but what is matched. Accuracy is
of the 10,000 test images: the mean over seeds (of the student's numbers and of the order), and a
95 % interval of it by Student's t.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import fashion
import numpy as np
import torch
from scipy import stats

from penjing.data import Dataset
from penjing.graph import find_blocks
from penjing.model import Model, Source
from penjing.transfer import transfer

ROWS = {
    "from scratch: labels": {"outputs": "labels"},
    "outputs: KD (T = 4), labels": {"outputs": {"kl": 0.5, "labels": 1.0}, "temperature": 4.0},
    "outputs: DKD (T = 4), labels": {"outputs": {"dkd": 0.5, "labels": 1.0}, "temperature": 4.0},
    "features: hidden states, labels": {"outputs": "labels", "features": "hidden"},
    "parameters, then labels": {"outputs": "labels", "parameters": True},
    "all: parameters, hidden states, KD, labels": {
        "outputs": {"kl": 0.5, "labels": 1.0}, "temperature": 4.0, "features": "hidden",
        "parameters": True,
    },
}  # fmt: skip


def wrapped(module: torch.nn.Module, name: str) -> Model:
    example = {"x": fashion.images("t10k")[0][:8]}
    return Model(module.eval(), "tensor", example, Source("factory", name, name),
                 find_blocks(module))  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--images", type=int, default=7680)
    parser.add_argument("--lr", type=float, default=4e-3)
    parser.add_argument("--rows", type=int, nargs="*")
    parser.add_argument("-o", "--output", type=Path)
    args = parser.parse_args()
    teacher = wrapped(fashion.trained(), "resnet20")
    x, y = fashion.images("train")
    chosen = np.linspace(0, len(x) - 1, args.images).astype(int)
    data = Dataset("arrays", tuple({"x": x[i].numpy()} for i in chosen), y[chosen].numpy())
    base = fashion.accuracy(teacher.module)
    print(f"teacher {base:.4f}, {teacher.parameter_count:,} parameters", flush=True)
    found: dict[str, list[float]] = {}
    seconds: dict[str, list[float]] = {}
    small = 0
    names = [n for i, n in enumerate(ROWS) if args.rows is None or i in args.rows]
    for seed in range(args.seeds):
        for name in names:
            options = {"parameters": False} | ROWS[name]
            torch.manual_seed(seed)
            student = wrapped(fashion.ResNet(width=8), "half")
            small, start = student.parameter_count, time.process_time()
            made = transfer(
                teacher, student, data, **options, steps=args.steps, within=0, lr=args.lr,
                samples=args.images, batch=128, seed=seed,
                tell=lambda line: print(f"    {line}", flush=True),
            )  # fmt: skip
            seconds.setdefault(name, []).append(time.process_time() - start)
            found.setdefault(name, []).append(fashion.accuracy(made.module))
            print(f"{name}, seed {seed}: {found[name][-1]:.4f}, {seconds[name][-1]:.0f} CPU s",
                  flush=True)  # fmt: skip
    if args.output:
        args.output.write_text(_table(found, seconds, base, teacher.parameter_count, small, args))
        args.output.with_suffix(".json").write_text(json.dumps(
            {"accuracy": found, "cpu_seconds": seconds, "teacher": base, "steps": args.steps,
             "images": args.images}, indent=1) + "\n")  # fmt: skip


def _table(found, seconds, base, large, small, args) -> str:  # type: ignore[no-untyped-def]
    lines = [
        "# Transfer on Fashion-MNIST", "",
        f"Teacher: ResNet-20, {large:,} parameters, {base:.2%} of the 10,000 test images. Student: "
        f"half the channels, {small:,} parameters. {args.steps} steps of 128 on "
        f"{args.images:,} training images, {args.seeds} seeds; `python bench/transfer.py`.", "",
        "| What is transferred | Accuracy, mean | 95 % interval | Seeds | CPU s |",
        "|---|---|---|---|---|",
    ]  # fmt: skip
    for name, values in found.items():
        mean, half = np.mean(values), 0.0
        if len(values) > 1:
            half = stats.t.ppf(0.975, len(values) - 1) * stats.sem(values)
        each = ", ".join(f"{v:.2%}" for v in values)
        lines.append(f"| {name} | {mean:.2%} | {mean - half:.2%} to {mean + half:.2%} | {each} | "
                     f"{np.mean(seconds[name]):.0f} |")  # fmt: skip
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
