"""A student of half the latency derived from MiniLM-L6, beside uniformly halved ones.

    python bench/transfer_structure.py [-o bench/results/transfer-structure.md]

The student's architecture is derived from the teacher (`penjing.structure`), with nothing said but
half of its latency in onnxruntime (batch 1, 128 tokens, 1 thread). Beside it, with the same closed
forms: half of the hidden units and heads of every block (`penjing shrink`), and half of the blocks,
evenly spaced (`penjing cut`, with its patches). Then all have as many CPU-seconds of distillation
toward the teacher's embeddings, with the same optimizer, learning rate and order of sentences; the
seconds of deriving come on top and are told. Calibration and training: sentences of State of the
Union speeches, of BBC News and of WordNet's glosses. Evaluation: 1,200 sentences about movies, as
in bench/quantization.py; error: 1 - cosine to the teacher's embedding, mean with its 95 % interval.
Latency: of the exported students, each over the teacher's, the median of interleaved ratios.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from functools import partial
from pathlib import Path

import torch
from quantization import batches as encoded
from quantization import drawn, errors, movies, outputs
from recovery import training

import penjing
from penjing.apply import apply
from penjing.demo import minilm
from penjing.export import export
from penjing.measure import Candidate, measure_files, median_ratio
from penjing.model import Batch, Model
from penjing.objective import Objective
from penjing.recipe import Recipe
from penjing.steps.cut import Cut
from penjing.steps.shrink import Shrink
from penjing.structure import derive
from penjing.training import descend

SHARE = 0.5
CALIBRATION = 24  # batches of 16 sentences
LR = 2e-4


def uniform(step: Shrink | Cut, teacher: Model, few: list[Batch]) -> Model:
    return apply(teacher, Recipe((step,)), few).model


def recovered(student: Model, far: Objective, train: list[Batch], seconds: float) -> int:
    """Trains in place for so many CPU-seconds; the steps that were made."""
    own = []
    for name, parameter in student.module.named_parameters():
        parameter.requires_grad_(name.startswith("encoder."))
        own += [parameter] if parameter.requires_grad else []
    begin = time.process_time()
    for batch in train[-6:]:
        far(student, batch).backward()
    steps = int(seconds / ((time.process_time() - begin) / 6 + 0.03))
    student.module.zero_grad()
    begin = time.process_time()
    done = 0
    for _ in descend(train, [(own, LR)], lambda batch, _: far(student, batch), steps=steps):
        done += 1
        if time.process_time() - begin > seconds:
            break
    return done


def share_of(models: list[Model], teacher: Model) -> list[float]:
    """Latencies over the teacher's."""
    with tempfile.TemporaryDirectory() as folder:
        files = []
        for number, model in enumerate([teacher, *models]):
            place = Path(folder) / str(number)
            place.mkdir()
            export(model, place, ("onnx",))
            files.append(Candidate(place / "model.onnx", "onnxruntime", model.parameter_count))
        was, *now = measure_files(files, teacher, length=128, threads=1, runs=400, seconds=30.0)
    return [1 / median_ratio(was, one) for one in now]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seconds", type=float, default=100.0, help="CPU-seconds of distillation.")
    parser.add_argument("-o", "--output", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    teacher = penjing.load(str(minilm()))
    train = training(teacher, 3840)
    few, train = train[:CALIBRATION], train[CALIBRATION:]
    data = encoded(teacher, drawn(movies(), 1200, 3), "movies")
    wanted = outputs(teacher, data)
    ways = {
        "derived for half the latency": lambda: derive(teacher, few, SHARE, "latency", threads=1),
        "every block half as wide": partial(uniform, Shrink(0.5), teacher, few),
        "half of the blocks": partial(
            uniform, Cut(blocks=tuple(teacher.blocks[i] for i in (1, 2, 4))), teacher, few
        ),
    }
    far = Objective(teacher)
    for batch in train:  # the teacher's outputs are the same for all: not of their seconds
        far(teacher, batch)
    lines, models = [], []
    why = ""
    for name, way in ways.items():
        begin = time.process_time()
        made = way()
        if name.startswith("derived"):
            why, made = made.why, made.model
        took, before = time.process_time() - begin, errors(made, data, wanted)
        steps = recovered(made, far, train, args.seconds)
        after = errors(made, data, wanted)
        cells = [f"{float(e.mean()):.4f} ± {1.96 * float(e.std()) / len(e) ** 0.5:.4f}"
                 for e in (before, after)]  # fmt: skip
        models.append(made)
        lines.append([name, f"{made.parameter_count:,}", f"{took:.0f}", cells[0], f"{steps}",
                      cells[1]])  # fmt: skip
        print(lines[-1], why, flush=True)
    shares = share_of(models, teacher)
    about = [part.replace("\n", " ") for part in (__doc__ or "").split("\n\n")[2:]]
    text = ["# Half of MiniLM-L6's latency", "", *about, "",
            f"{args.seconds:.0f} CPU-seconds of distillation each. {why.capitalize()}.", "",
            "| student | latency | parameters | CPU s to make | error, no training "
            "| steps | error, trained |",
            "|---|---|---|---|---|---|---|"]  # fmt: skip
    for line, share in zip(lines, shares, strict=True):
        text.append(f"| {line[0]} | {share:.3f} | " + " | ".join(line[1:]) + " |")
    print("\n".join(text), flush=True)
    if args.output:
        args.output.write_text("\n".join(text).rstrip() + "\n")


if __name__ == "__main__":
    main()
