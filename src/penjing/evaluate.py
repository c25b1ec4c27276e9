"""Quality of a model on data, and the drop from one to another with its interval.

A predictor is anything that turns a batch into the model's one output: a torch module or an
exported file in a runtime. Everything else is the same for all of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from penjing import processor
from penjing.data import Dataset, encode, prepare
from penjing.errors import InputError, UsageError
from penjing.model import Batch, Model
from penjing.progress import track
from penjing.result import Drop
from penjing.statistics import paired_bootstrap
from penjing.tasks import Task

__all__ = ["Evaluation", "Predictor", "compare", "evaluate", "torch_predictor"]

Predictor = Callable[[Batch], np.ndarray]

# Logits of one batch of a language model are kept below 64 M numbers (256 MB in float32).
LARGEST_OUTPUT = 1 << 26


@dataclass(frozen=True, eq=False)
class Evaluation:
    """A metric on data.

    Attributes:
        value: the task's metric over all samples.
        rows: float64 [samples, m], what the metric is reduced from.
        samples: number of samples (pairs, or windows of text).
    """

    value: float
    rows: np.ndarray
    samples: int


def torch_predictor(model: Model, *, fast: bool = False) -> Predictor:
    """A predictor that runs the torch module, without gradients, on the model's device.

    Args:
        model: looked at anew on each call, so later edits count.
        fast: bfloat16 autocast; quicker on machines with bfloat16 arithmetic, and less exact.
    """

    def predict(batch: Batch) -> np.ndarray:
        device = model.device
        moved = {name: tensor.to(device) for name, tensor in batch.items()}
        with torch.no_grad(), processor.autocast(device.type, fast):
            return model.run(moved).float().cpu().numpy()

    return predict


def evaluate(
    predict: Predictor,
    model: Model,
    dataset: Dataset,
    task: Task,
    *,
    length: int = 128,
    batch: int = 32,
    reference: Predictor | None = None,
) -> Evaluation:
    """Run `predict` over all samples and measure `task`.

    Args:
        predict: batch to output.
        model: says how samples become batches; need not be what `predict` runs.
        dataset: samples; texts of causal models are cut into windows.
        task: what to measure.
        length: most tokens of a text, or of a window.
        batch: samples in a batch; fewer where a language model's logits would be too large.
        reference: the original, for tasks that compare with it (`needs_reference`).

    Raises:
        InputError: data that does not suit, an output of NaN or of a wrong size, or a metric
            that is infinite.
        UsageError: a needed `reference` is missing.
    """
    if task.needs_reference and reference is None:
        raise UsageError(f"the metric {task.metric} needs the original to compare with")
    task.check(dataset, model)
    prepared = prepare(dataset, model, length)
    batch = _affordable(batch, length, model)
    records = []
    done = 0
    total = math.ceil(len(prepared) * _inputs_a_sample(prepared, model) / batch)
    batches = encode(prepared, model, length=length, batch=batch)
    for inputs in track(batches, f"evaluating {task.metric}", total):
        output = predict(inputs)
        count = len(next(iter(inputs.values())))
        if len(output) != count:
            raise InputError("first dimension of the output", got=len(output), allowed=count)
        original = None
        if task.needs_reference and reference is not None:
            original = output if reference is predict else reference(inputs)
        record = task.record(output, inputs, original)
        if np.isnan(output).any() or np.isnan(record).any():
            raise InputError(
                "the model's output is not a number (NaN)",
                got=f"in samples {done + 1} to {done + count}",
                next="the model or its edit overflows; use fewer or milder edits",
            )
        records.append(record)
        done += count
    rows = task.rows(np.concatenate(records), prepared)
    value = task.reduce(rows)
    if not math.isfinite(value):
        raise InputError(
            f"{task.metric} is not finite",
            got=value,
            next="the model or its edit is broken; use fewer or milder edits",
        )
    return Evaluation(value, rows, len(rows))


def compare(
    before: Evaluation,
    after: Evaluation,
    task: Task,
    *,
    confidence: float = 0.95,
    seed: int = 0,
) -> Drop:
    """The drop from `before` to `after` on the same samples, by paired bootstrap.

    Raises:
        InputError: evaluations of different samples.
    """
    value, low, high = paired_bootstrap(
        before.rows,
        after.rows,
        task.reduce,
        relative=task.relative,
        higher_is_better=task.higher_is_better,
        confidence=confidence,
        seed=seed,
    )
    return Drop(value, low, high, confidence, before.samples, task.relative)


def _inputs_a_sample(dataset: Dataset, model: Model) -> int:
    return 2 if dataset.kind == "pairs" and model.interface == "embedding" else 1


def _affordable(batch: int, length: int, model: Model) -> int:
    if model.interface != "causal":
        return batch
    config = getattr(model.module, "config", None)
    vocabulary = getattr(config, "vocab_size", None) or 1
    return max(1, min(batch, LARGEST_OUTPUT // (length * int(vocabulary))))
