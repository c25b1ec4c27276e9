"""Tasks: what quality means. One file a task, found by its name; a user's function is one too."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol, cast

import numpy as np

from penjing.data import Dataset
from penjing.errors import InputError, PenjingError
from penjing.model import Batch, Model
from penjing.registry import attribute_of, lookup

__all__ = ["Custom", "Score", "Task", "default_task", "find"]

Score = Callable[[np.ndarray, np.ndarray | None], np.ndarray]


class Task(Protocol):
    """A measure of quality.

    Attributes:
        metric: its name for people.
        higher_is_better: of the metric.
        relative: whether a drop is divided by the original's metric.
        needs_reference: whether `record` needs the original's output.
    """

    @property
    def metric(self) -> str: ...
    @property
    def higher_is_better(self) -> bool: ...
    @property
    def relative(self) -> bool: ...
    @property
    def needs_reference(self) -> bool: ...

    def check(self, dataset: Dataset, model: Model) -> None:
        """Raise InputError when the data or the model does not suit, before any work."""

    def record(self, output: np.ndarray, batch: Batch, reference: np.ndarray | None) -> np.ndarray:
        """What is kept of a batch's output, [n, ...]."""

    def rows(self, records: np.ndarray, dataset: Dataset) -> np.ndarray:
        """One row a sample, float64 [n, m], of the records and the prepared dataset."""

    def reduce(self, rows: np.ndarray) -> float:
        """The metric of any choice of rows."""


@dataclass(frozen=True)
class Custom:
    """A user's `score(outputs [n, ...], labels [n] | None) -> [n]`, higher is better.

    The metric is the mean of the scores.
    """

    score: Score
    metric: str
    higher_is_better: bool = field(default=True, init=False)
    relative: bool = field(default=False, init=False)
    needs_reference: bool = field(default=False, init=False)

    def check(self, dataset: Dataset, model: Model) -> None:
        """Refuse models whose outputs have no fixed shape.

        Raises:
            InputError: a causal model or a bare weight file.
        """
        if model.interface in ("causal", "weights"):
            raise InputError(
                "a function of one's own needs one output of fixed shape a sample",
                got=f"a model of kind {model.interface}",
                next="use the task perplexity or fidelity",
            )

    def record(self, output: np.ndarray, batch: Batch, reference: np.ndarray | None) -> np.ndarray:
        """The output itself."""
        return output

    def rows(self, records: np.ndarray, dataset: Dataset) -> np.ndarray:
        """The scores, float64 [n, 1].

        Raises:
            InputError: the function fails, or does not give one finite number a sample.
        """
        try:
            scores = np.asarray(self.score(records, dataset.labels), dtype=np.float64)
        except PenjingError:
            raise
        except Exception as error:
            raise InputError(
                f"the task {self.metric} failed", got=f"{type(error).__name__}: {error}"
            ) from error
        if scores.shape != (len(dataset),) or not np.isfinite(scores).all():
            raise InputError(
                f"scores of the task {self.metric}",
                got=f"shape {scores.shape}, {int((~np.isfinite(scores)).sum())} not finite",
                allowed=f"({len(dataset)},), all finite: one score a sample",
            )
        return scores[:, None]

    def reduce(self, rows: np.ndarray) -> float:
        """Mean score."""
        return float(rows[:, 0].mean())


def find(name: str | Score | Task | None, dataset: Dataset, model: Model) -> Task:
    """The task that `name` stands for, made for the model.

    Args:
        name: a built-in name, `file.py:function`, a function, a task, or None for
            `default_task`.
        dataset: what it will be evaluated on.
        model: the original.

    Raises:
        UsageError: an unknown name; the choices are listed.
        InputError: a function that cannot be loaded.
    """
    if name is None:
        name = default_task(dataset, model)
    if isinstance(name, str) and ":" in name:
        name = cast(Score, attribute_of(name))
        if not callable(name):
            raise InputError("a task must be a function", got=type(name).__name__)
    if isinstance(name, str):
        task: Any = lookup("tasks", name, "task")
        return cast(Task, task.bind(model) if hasattr(task, "bind") else task)
    if callable(name):
        return Custom(name, getattr(name, "__name__", type(name).__name__))
    return name


def default_task(dataset: Dataset, model: Model) -> str:
    """Name of the task that the data and the model suggest.

    Labels and embeddings are retrieval, labels and logits classification, a causal model
    perplexity, scored pairs similarity; anything else is fidelity, which suits all.
    """
    if model.interface == "causal":
        order = ["perplexity"]
    elif model.interface == "embedding":
        order = ["similarity", "retrieval"]
    else:
        order = ["classification"]
    if order == ["classification"] and dataset.labels is not None and model.interface != "tensor":
        return "classification"  # whose own check says what is wrong with the labels
    for name in order:
        try:
            lookup("tasks", name, "task").check(dataset, model)
        except InputError:
            continue
        return name
    return "fidelity"
