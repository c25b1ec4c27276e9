"""A smaller MiniLM: a minute of distillation from its teacher's weights, ten from random ones.

    python bench/transfer_minilm.py [--seconds 60] [ROW ...]

Two students of MiniLM-L6: three of its six blocks, and all six with half of the width everywhere
(hidden states of 192, six heads, 768 hidden units). Begun with the teacher's weights
(`penjing transfer`) they are trained for `--seconds` of a processor, begun with random ones for ten
times as many: as many steps as the student's own forward and backward pass allow in that time (the
teacher's come on top, once for every text), toward the teacher's embeddings, on three quarters of
BBC News in batches of 16, cut at 64 tokens. Measured on the last quarter: the mean cosine to the
teacher's embedding (of the narrow student through an affine map, fitted to 512 of the training
texts), and label retrieval. One seed. Every row that is made is kept in
bench/results/transfer-minilm.json.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from pathlib import Path

import torch
from torch import Tensor, nn

import penjing
from penjing.data import Dataset, encode, read
from penjing.demo import bbc_news, minilm
from penjing.model import Model

STORE = Path(__file__).resolve().parent / "results" / "transfer-minilm.json"
LENGTH, SIZE, OPTIMIZER = 64, 16, 0.03
LR = {"its weights": 5e-4, "random weights": 5e-4}


def embeddings(model: Model, teacher: Model, data: Dataset) -> Tensor:
    """[samples, width]."""
    with torch.no_grad():
        return torch.cat([model.run(b) for b in encode(data, teacher, length=LENGTH, batch=32)])


def cosine(model: Model, teacher: Model, train: Dataset, test: Dataset) -> Tensor:
    """Of each sample, [samples]; of another width through an affine map."""
    found, wanted = (embeddings(m, teacher, test) for m in (model, teacher))
    if found.shape[1] != wanted.shape[1]:
        some = train.spread(512)
        x, y = (embeddings(m, teacher, some).double() for m in (model, teacher))
        ones = torch.ones(len(x), 1, dtype=x.dtype)
        way = torch.linalg.lstsq(torch.cat([x, ones], 1), y).solution
        rows = torch.cat([found.double(), ones[:1].expand(len(found), 1)], 1)
        found = (rows @ way).float()
    return nn.functional.cosine_similarity(found, wanted)


def shallow(teacher: Model, train: Dataset) -> Model:
    return penjing.cut(teacher, 3, data=train, patch="none", samples=32, length=LENGTH)


def narrow(teacher: Model, train: Dataset) -> Model:
    config = copy.deepcopy(teacher.module.config)
    for name in ("hidden_size", "intermediate_size", "num_attention_heads"):
        setattr(config, name, getattr(config, name) // 2)
    made = teacher.copy()
    made.module = type(teacher.module)(config, add_pooling_layer=False).eval()
    return made


STUDENTS = {"three of six blocks": shallow, "half as wide": narrow}


def randomized(model: Model) -> Model:
    """As BERT begins."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.module.parameters():
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=0.02)
            else:
                parameter.fill_(0)
        for part in model.module.modules():
            if isinstance(part, nn.LayerNorm):
                part.weight.fill_(1)
    return model


def step_cost(model: Model, train: Dataset) -> float:
    """CPU-seconds of a step of the student alone."""
    some = list(encode(train.spread(12 * SIZE), model, length=LENGTH, batch=SIZE))
    twin = model.copy()
    twin.module.requires_grad_(True)
    twin.run(some[0]).square().sum().backward()
    begin = time.process_time()
    for batch in some[1:]:
        twin.run(batch).square().sum().backward()
    return (time.process_time() - begin) / (len(some) - 1) + OPTIMIZER


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("rows", nargs="*", metavar="ROW")
    parser.add_argument("--seconds", type=float, default=60.0)
    args = parser.parse_args()
    wanted = args.rows
    torch.set_num_threads(1)
    teacher = penjing.load(str(minilm()))
    data = read(bbc_news())
    order = torch.randperm(len(data.samples), generator=torch.Generator().manual_seed(0)).tolist()
    border = len(order) * 3 // 4
    train, test = data.subset(order[:border]), data.subset(order[border:])
    kept = json.loads(STORE.read_text()) if STORE.exists() else {}

    def row(name: str, seconds: float, steps: int, cpu: float, model: Model) -> None:
        near = cosine(model, teacher, train, test)
        half = 1.96 * float(near.std()) / len(near) ** 0.5
        found = penjing.evaluate(model, test, task="retrieval", length=LENGTH)
        kept[name] = [model.parameter_count, seconds, steps, cpu, float(near.mean()), half,
                      found["value"]]  # fmt: skip
        print(name, kept[name], flush=True)
        STORE.write_text(json.dumps(kept, indent=1) + "\n")
        STORE.with_suffix(".md").write_text(table(kept, len(train.samples), len(test.samples)))

    if not wanted:
        row("the teacher itself", 0, 0, 0, teacher)
    for student, make in STUDENTS.items():
        for begun, seconds in (("its weights", 0), ("its weights", args.seconds),
                               ("random weights", 10 * args.seconds)):  # fmt: skip
            name = f"{student}, {begun}" + ("" if seconds else ", untrained")
            if wanted and name not in wanted:
                continue
            start = randomized(make(teacher, train))
            steps = int(seconds / step_cost(start, train))
            begin = time.process_time()
            made = penjing.transfer(
                teacher, start, train, parameters=begun == "its weights",
                outputs=None if steps else (), steps=steps, within=0, lr=LR[begun],
                samples=len(train.samples), length=LENGTH, batch=SIZE,
                tell=lambda line: print("   ", line, flush=True),
            )  # fmt: skip
            row(name, seconds, steps, time.process_time() - begin, made)


def table(kept: dict[str, list[float]], train: int, test: int) -> str:
    """All rows that were made."""
    about = (__doc__ or "").split("\n\n")[2].split(" Every row")[0].replace("\n", " ")
    lines = ["# Smaller MiniLMs", "", about, "",
             f"Trained on {train:,} texts, measured on {test:,} others.", "",
             "| student, begun with | parameters | seconds | steps | CPU s in all | "
             "cosine to the teacher, 95 % interval | label retrieval |",
             "|---|---|---|---|---|---|---|"]  # fmt: skip
    for name, (parameters, seconds, steps, cpu, near, half, right) in kept.items():
        lines.append(f"| {name} | {parameters:,} | {seconds:.0f} | {steps} | {cpu:.0f} | "
                     f"{near:.4f} ± {half:.4f} | {right:.2%} |")  # fmt: skip
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
