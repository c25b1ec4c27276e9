"""Recovery of MiniLM-L6 without two of its six blocks, against the CPU-seconds it takes.

    python bench/recovery.py [recover] ['plain distillation'] [two-bits]

Training: State of the Union speeches, BBC News, WordNet's glosses, and VADER's newspaper opinions,
tweets and product reviews. Evaluation, twice: 1,200 sentences about movies, a kind that no training
saw (bench/quantization.py), and 200 other sentences of each kind of the training. Error: 1 - cosine
to the embedding of the whole network in float32, mean with its 95 % interval. Settings of `recover`
were chosen on sentences of the training's kinds, glosses kept from the training there; its learning
rate a second time after a first figure about movies was seen (6e-4: 0.1293 after 50 CPU-seconds,
0.0604 after 229), as that of `two-bits`; plain distillation has 2e-4 (4e-4: 0.1451 after 25).
CPU-seconds are of one thread, from the start of the cut to the last step; reading and tokenizing
texts and evaluating are not among them. Two ways down with the same optimizer: `recover` from a
greedy cut with its linear patch, hidden states beside the output, the blocks in front of the cut
held for a quarter of the way (`--front`); and plain distillation on the output, all blocks, from
the plain drop by block influence (ShortGPT). Both have 1,500 sentences of each kind, in turn. Of
the first, two other ways were seen on this evaluation: the front held all the way, 750 sentences of
each kind (0.0610 and 0.0564 after 173 CPU-seconds), and never held (0.0572 and 0.0520 after 228).
`two-bits` was measured before steps became cheaper, on the first three kinds.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from quantization import (
    batches,
    drawn,
    editorials,
    errors,
    glosses,
    movies,
    news,
    outputs,
    products,
    speeches,
    tweets,
)
from torch import Tensor

import penjing
from penjing.apply import apply
from penjing.batching import by_length
from penjing.demo import minilm
from penjing.front import Front, front_of
from penjing.model import Batch, Model
from penjing.objective import Objective
from penjing.recipe import Recipe
from penjing.steps.cut import Cut
from penjing.steps.quantize import Quantize
from penjing.steps.recover import Recover
from penjing.training import descend

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"
BUDGET = 200.0  # CPU-seconds
MARKS = (25.0, 50.0, 100.0)
# Steps whose cost is tried, CPU-seconds of the optimizer in one, and what of the budget is planned.
TRIED, STEP, SAFE = 8, 0.015, 0.93
SIZE = 16  # sentences of a step
KINDS = speeches, news, glosses, editorials, tweets, products
HELD = 200  # sentences of each kind that are judged by
CALIBRATION = 600  # sentences that the cut and its patch are fitted to


def texts_of(count: int) -> tuple[list[str], list[str]]:
    """Sentences to learn from, and others of the same kinds to judge by."""
    learned: list[str] = []
    held: list[str] = []
    for seed, kind in enumerate(KINDS):
        # No text twice, so that none is on both sides.
        own = list(dict.fromkeys(kind()))
        own = drawn(own, len(own), seed)
        held += own[:HELD]
        learned += own[HELD : HELD + count // len(KINDS)]
    return learned, held


def training(model: Model, count: int) -> list[Batch]:
    """Batches of sentences of about one length, in random order."""
    return by_length(model, batches(model, texts_of(count)[0], "recovery", SIZE), seed=3)


class Clock:
    """CPU-seconds of this process, without those in which it stood."""

    def __init__(self) -> None:
        self._start, self._stood = time.process_time(), 0.0

    @property
    def now(self) -> float:
        return time.process_time() - self._start - self._stood

    def aside(self, work: Any) -> Any:
        begin = time.process_time()
        found = work()
        self._stood += time.process_time() - begin
        return found


def down(
    model: Model, judges: list[tuple[list[Batch], Tensor]], *,
    criterion: str, patch: str, hidden: float, lr: float, held: bool, sentences: int,
) -> list[list[float]]:  # fmt: skip
    """CPU-seconds, steps, and of each of `judges` error and half its interval, at each mark."""
    train = training(model, sentences)
    clock, rows, marks = Clock(), [], list(MARKS)
    recipe = Recipe((Cut(layers=2, criterion=criterion, patch=patch),))
    student = apply(model, recipe, train[: CALIBRATION // SIZE]).model
    front = front_of(model, student, {n: x[:1] for n, x in train[0].items()}) if held else Front()
    own = {n: p for n, p in student.module.named_parameters() if n.startswith("encoder.")}
    for name, parameter in student.module.named_parameters():
        parameter.requires_grad_(name in own)
    early, late = (Objective(model, hidden=hidden, front=count) for count in (front.count, 0))

    def far(batch: Batch, done: float) -> Tensor:
        # As `recover --front`: what stands before the cut is held for a quarter of the way.
        return (early if held and done < 0.25 else late)(student, batch)

    def look(done: int) -> None:
        found = [clock.now, float(done)]
        for data, wanted in judges:
            off = clock.aside(lambda data=data, wanted=wanted: errors(student, data, wanted))
            found += [float(off.mean()), 1.96 * float(off.std()) / len(off) ** 0.5]
        rows.append(found)
        print(patch, found, flush=True)

    look(0)
    costs = []
    for objective in (early if held else late, late):  # without a front the second time it is known
        begin = clock.now
        for batch in train[:TRIED]:
            objective(student, batch).backward()
        costs.append((clock.now - begin) / TRIED + STEP)
    left = SAFE * (BUDGET - clock.now)
    if held:
        steps = int(left / (0.25 * costs[0] + 0.75 * costs[1]))
    else:
        first = min(len(train), int(left / costs[0]))
        steps = first + int(max(0.0, left - first * costs[0]) / costs[1])
    done = 0
    for _ in descend(train, [(list(own.values()), lr)], far, steps=steps):
        done += 1
        if marks and clock.now >= marks[0]:
            marks.pop(0)
            look(done)
    look(done)
    return rows


WAYS: dict[str, dict[str, Any]] = {
    "recover": {
        "criterion": "greedy",
        "patch": "linear",
        "hidden": 4.0,
        "lr": 3e-4,
        "held": True,
        "sentences": 9000,
    },
    "plain distillation": {
        "criterion": "influence",
        "patch": "none",
        "hidden": 0.0,
        "lr": 2e-4,
        "held": False,
        "sentences": 9000,
    },
}


def two_bits(model: Model, train: list[Batch], data: list[Batch], wanted: Tensor) -> dict[str, Any]:
    """Quantization-aware recovery: codes and scales of a 2-bit encoder learn."""
    quantize = Quantize(
        bits=2, group=64, method="clip", targets=("encoder.*",), scale_bits=16, alpha=0.0,
        bias=False,
    )  # fmt: skip
    small = apply(model, Recipe((quantize,)), train[:24]).model
    clock = Clock()
    step = Recover(seconds=0, steps=60, lr=5e-4, codes=True, hidden=1.0, targets=("encoder.*",))
    better = apply(small, Recipe((step,)), train[:72], original=model).model
    seconds = clock.now
    found: dict[str, Any] = {"seconds": seconds, "steps": step.steps}
    for name, made in (("before", small), ("after", better)):
        off = errors(made, data, wanted)
        found[name] = [float(off.mean()), 1.96 * float(off.std()) / len(off) ** 0.5]
    for name, planes in better.planes.items():
        held = planes.dequantize()
        assert torch.equal(held, better.module.get_parameter(name)), name
        assert int(planes.codes.max()) <= 3, name
    found["changed"] = sum(
        float((p.codes != small.planes[n].codes).float().mean()) for n, p in better.planes.items()
    ) / len(better.planes)
    print(found, flush=True)
    return found


def plot(found: dict[str, Any]) -> str:
    """The curves as SVG."""
    wide, high, left, low = 640, 360, 64, 44
    top = max(row[2] for name in WAYS for row in found[name]) * 1.05

    def place(seconds: float, error: float) -> str:
        x = left + (wide - left - 16) * seconds / (BUDGET * 1.02)
        return f"{x:.1f},{high - low - (high - low - 16) * error / top:.1f}"

    def text(at: str, words: str, anchor: str = "middle") -> str:
        x, y = at.split(",")
        return f'<text x="{x}" y="{y}" text-anchor="{anchor}">{words}</text>'

    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {wide} {high}" '
             'font-family="sans-serif" font-size="13" fill="#222">'
             f'<rect width="{wide}" height="{high}" fill="#fff"/>']  # fmt: skip
    for number in range(0, 201, 50):
        x, _ = place(number, 0).split(",")
        parts.append(text(f"{x},{high - low + 18}", str(number)))
    for share in range(int(top / 0.04) + 1):
        _, y = place(0, share * 0.04).split(",")
        parts.append(f'<path d="M{left} {y}H{wide - 16}" stroke="#ddd"/>')
        parts.append(text(f"{left - 8},{float(y) + 4}", f"{share * 0.04:.2f}", "end"))
    parts.append(text(f"{(wide + left) / 2},{high - 8}", "CPU-seconds"))
    parts.append(text(f"{left},12", "error, 1 - cosine", "start"))
    for name, colour in zip(WAYS, ("#0a7d4f", "#b3541e"), strict=True):
        points = " ".join(place(row[0], row[2]) for row in found[name])
        parts.append(f'<polyline points="{points}" fill="none" stroke="{colour}" '
                     'stroke-width="2"/>')  # fmt: skip
        x, y = place(found[name][1][0], found[name][1][2]).split(",")
        parts.append(f'<g fill="{colour}">{text(f"{float(x) + 6},{float(y) - 8}", name, "start")}'
                     "</g>")  # fmt: skip
    return "\n".join([*parts, "</svg>"]) + "\n"


def table(found: dict[str, Any]) -> str:
    """What was measured."""
    about = [part.replace("\n", " ") for part in (__doc__ or "").split("\n\n")[2:]]
    lines = ["# Recovering MiniLM-L6", "", *about, ""]
    if all(name in found for name in WAYS):
        start = found["plain distillation"][0][2::2]
        lines += ["## Two of six blocks cut", "",
                  "| way | CPU-seconds | steps | error, movies | of the plain cut's "
                  "| error, kinds of the training | of the plain cut's |",
                  "|---|---|---|---|---|---|---|"]  # fmt: skip
        for name in WAYS:
            for seconds, steps, *errors_of in found[name]:
                cells = [f"{error:.4f} ± {half:.4f} | {error / first:.3f}" for error, half, first
                         in zip(errors_of[::2], errors_of[1::2], start, strict=True)]  # fmt: skip
                lines.append(f"| {name} | {seconds:.0f} | {steps:.0f} | {' | '.join(cells)} |")
        lines += ["", "![error against CPU-seconds](recovery-minilm.svg)", ""]
    if "two-bits" in found:
        now = found["two-bits"]
        lines += [
            "## Quantization-aware, at 2 bits", "",
            "Rounded to 2 bits with clipped ranges, groups of 64, then `recover` with `codes` for "
            f"{now['steps']} steps in {now['seconds']:.0f} CPU-seconds; {now['changed']:.1%} of "
            "the codes changed, and every weight is what its planes say.", "",
            "| | error, 95 % interval |", "|---|---|",
        ]  # fmt: skip
        lines += [f"| {name} | {now[name][0]:.4f} ± {now[name][1]:.4f} |"
                  for name in ("before", "after")]  # fmt: skip
    return "\n".join(lines).rstrip() + "\n"


def main(wanted: list[str]) -> None:
    torch.set_num_threads(1)
    model = penjing.load(str(minilm()))
    data = batches(model, drawn(movies(), 1200, 3), "movies")
    reference = outputs(model, data)
    held = batches(model, texts_of(0)[1], "recovery-held")
    store = RESULTS / "recovery-minilm.json"
    found = json.loads(store.read_text()) if store.exists() else {}
    for name, way in WAYS.items():
        if not wanted or name in wanted:
            judges = [(data, reference), (held, outputs(model, held))]
            found[name] = down(model, judges, **way)
            store.write_text(json.dumps(found, indent=1) + "\n")
    if not wanted or "two-bits" in wanted:
        found["two-bits"] = two_bits(model, training(model, 1500), data, reference)
        store.write_text(json.dumps(found, indent=1) + "\n")
    if all(name in found for name in WAYS):
        (RESULTS / "recovery-minilm.svg").write_text(plot(found))
    (RESULTS / "recovery-minilm.md").write_text(table(found))


if __name__ == "__main__":
    main(sys.argv[1:])
