"""Three of MiniLM's six layers: a minute of distillation from its weights, ten from random ones.

    python bench/transfer_minilm.py [--within 60] [-o bench/results/transfer-minilm.md]

The student is MiniLM-L6 with three blocks. From its teacher's weights (`penjing.transfer`) it is
trained for `--within` seconds, from random ones for ten times as long, on three quarters of BBC
News, toward the teacher's embeddings. Measured on the last quarter: the mean cosine
to the teacher's embedding, and label retrieval.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import nn

import penjing
from penjing.data import Dataset, read
from penjing.demo import bbc_news, minilm
from penjing.model import Model


def cosine(model: Model, teacher: Model, data: Dataset) -> float:
    """Mean over the samples."""
    from penjing.data import encode

    total, count = 0.0, 0
    with torch.no_grad():
        for batch in encode(data, teacher, length=64, batch=32):
            found = nn.functional.cosine_similarity(model.run(batch), teacher.run(batch))
            total, count = total + float(found.sum()), count + len(found)
    return total / count


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--within", type=float, default=60.0)
    parser.add_argument("--lr", type=float, default=5e-4)
    parser.add_argument("-o", "--output", type=Path)
    args = parser.parse_args()
    teacher = penjing.load(str(minilm()))
    data = read(bbc_news())
    order = torch.randperm(len(data.samples), generator=torch.Generator().manual_seed(0)).tolist()
    border = len(order) * 3 // 4
    train, test = data.subset(order[:border]), data.subset(order[border:])
    student = penjing.cut(teacher, 3, data=train, patch="none", samples=32, length=64)
    with torch.no_grad():
        for parameter in student.module.parameters():
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=0.02)
            else:
                parameter.fill_(0)
        for part in student.module.modules():
            if isinstance(part, nn.LayerNorm):
                part.weight.fill_(1)
    lines = [
        "# MiniLM in three layers", "",
        f"{student.parameter_count:,} of {teacher.parameter_count:,} parameters; trained on "
        f"{len(train.samples):,} texts of BBC News (64 tokens), measured on {len(test.samples):,} "
        "others. One seed; `python bench/transfer_minilm.py`.", "",
        "| Begins with | Seconds | Steps | Cosine to the teacher | Label retrieval |",
        "|---|---|---|---|---|",
    ]  # fmt: skip

    def row(name: str, seconds: float, steps: str, model: Model) -> None:
        found: dict[str, Any] = penjing.evaluate(model, test, task="retrieval", length=64)
        lines.append(f"| {name} | {seconds:.0f} | {steps} | {cosine(model, teacher, test):.4f} | "
                     f"{found['value']:.2%} |")  # fmt: skip
        print(lines[-1], flush=True)
        if args.output:
            args.output.write_text("\n".join(lines) + "\n")

    row("the teacher itself", 0, "", teacher)
    for name, own, seconds in (
        ("its weights", True, 0.0), ("its weights", True, args.within),
        ("random weights", False, 10 * args.within),
    ):  # fmt: skip
        told: list[str] = []
        made = penjing.transfer(
            teacher, student, train, parameters=own, outputs=None if seconds else (),
            within=seconds, lr=args.lr, samples=len(train.samples), length=64, tell=told.append,
        )  # fmt: skip
        print(told, flush=True)
        row(name, seconds, told[-1].split()[0] if seconds else "0", made)


if __name__ == "__main__":
    main()
