"""The samples of a fit: what edits are fitted to, what is searched on, what is reported on."""

from __future__ import annotations

import hashlib
import inspect
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from penjing.data import Dataset, check_disjoint, encode, prepare, split
from penjing.errors import InputError
from penjing.evaluate import compare, evaluate, torch_predictor
from penjing.model import Batch, Model
from penjing.result import Drop
from penjing.tasks import Task

__all__ = ["Samples", "about", "divide", "drop_of", "timed"]

# Most evaluation samples; windows of text cost a language model far more than a sentence.
_MOST = {"causal": 400}
_MOST_OTHERS = 4000


@dataclass
class Samples:
    """What a fit looks at.

    Attributes:
        calibration, evaluation: share no sample.
        edits: batches of calibration data that edits are fitted to.
        search: batches that the survey measures errors on.
        everything: batches that distillation sees.
    """

    calibration: Dataset
    evaluation: Dataset
    edits: list[Batch]
    search: list[Batch]
    everything: list[Batch]


def divide(
    model: Model,
    dataset: Dataset,
    calibration: Dataset | None,
    task: Task,
    length: int,
    seed: int,
    notes: list[str],
) -> Samples:
    """Calibration and evaluation data, prepared for the model; `notes` says what was done.

    Raises:
        InputError: data that does not suit, too little of it, or an overlap.
    """
    task.check(dataset, model)
    prepared = prepare(dataset, model, length)
    if calibration is None:
        if len(prepared) < 8:
            raise InputError(
                "too little data to split calibration off", got=len(prepared), allowed="8 or more",
                next="give more --data, or --calibration",
            )  # fmt: skip
        count = max(4, min(1024, round(0.35 * len(prepared))))
        tuned, prepared = split(prepared, count, seed)
        notes.append(
            f"calibration data: {len(tuned)} samples split off --data; figures are on the others"
        )
    else:
        tuned = prepare(calibration, model, length)
        check_disjoint(tuned, prepared)
    most = _MOST.get(model.interface, _MOST_OTHERS)
    if len(prepared) > most:
        notes.append(f"evaluated on {most} of {len(prepared)} samples, spread evenly")
        prepared = prepared.spread(most)
    small = model.interface == "causal"
    edits, search = (32, 8) if small else (96, 96)
    # In random order: files are often sorted by class, and the first would all be of one.
    order = np.random.default_rng(seed).permutation(len(tuned))
    tuned = tuned.subset(order)
    some = tuned.subset(range(min(len(tuned), 512)))
    size = 8 if small else 16
    everything = list(encode(some, model, length=length, batch=size))
    half = max(1, len(everything) // 2)
    used = everything[: min(half, -(-edits // size))]
    rest = everything[len(used) :][: -(-search // size)] or used
    return Samples(tuned, prepared, used, rest, everything)


def timed(run: Callable[[], object]) -> float:
    """Seconds of a call, above 0: the quicker of two, of which the first warms up."""
    times = []
    for _ in range(2):
        began = time.monotonic()
        run()
        times.append(time.monotonic() - began)
    return min(times) + 1e-9


def drop_of(
    model: Model,
    samples: Samples,
    task: Task,
    length: int,
    seed: int,
    notes: list[str],
    seconds: float = math.inf,
) -> Callable[[Model], Drop]:
    """A function: drop of the user's metric of an edited network, on calibration data.

    With as many samples as the original takes `seconds` for, 128 at the least, 512 at the most.
    Always 0 of 0 samples, with a note, where calibration data is not enough for the metric.
    """
    original = torch_predictor(model, fast=True)
    batch = samples.everything[0]
    rate = len(next(iter(batch.values()))) / timed(lambda: original(batch))  # samples a second
    count = min(len(samples.calibration), 512, max(128, round(min(seconds * rate, 512))))
    some = samples.calibration.subset(range(count))
    if model.interface == "causal":
        some = some.subset(range(min(len(some), 48)))
    try:
        task.check(some, model)
    except InputError as error:
        notes.append(f"no drops are known before a candidate is measured: {error}")
        return lambda variant: Drop(0.0, 0.0, 0.0, 0.95, 0, task.relative)
    before = evaluate(original, model, some, task, length=length, reference=original)

    def drop(variant: Model) -> Drop:
        predictor = torch_predictor(variant, fast=True)
        after = evaluate(predictor, model, some, task, length=length, reference=original)
        return compare(before, after, task, seed=seed)

    return drop


def about(samples: Samples, task: Task, length: int) -> str:
    """What `drop_of` depends on, besides the network: tells kept surveys apart."""
    digest = hashlib.sha256()
    for sample in samples.calibration.digests():
        digest.update(sample.encode())
    if samples.calibration.labels is not None:
        digest.update(np.ascontiguousarray(samples.calibration.labels).tobytes())
    score = getattr(task, "score", None)
    if score is not None:  # the user's own function: whatever its file says
        try:
            digest.update(Path(inspect.getfile(score)).read_bytes())
        except (TypeError, OSError):
            digest.update(repr(score).encode())
    return f"{type(task).__qualname__} {task.metric} {length} {digest.hexdigest()}"
