"""One trial of a network: the recipe applied, exported, and the file run beside the original's.

What is cheap comes first, and a trial that is out of the limits then goes no further:

    quality on a quarter of the search samples, in torch    where the whole interval is too low
    size of the exported file                               measured
    latency                                                 only where it is asked for
    quality on all search samples, through the file
"""

from __future__ import annotations

import gc
import math
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from penjing.data import Dataset, split
from penjing.errors import InputError, UsageError
from penjing.evaluate import Predictor, compare, torch_predictor
from penjing.fit import Budget
from penjing.fit.bench import Bench, Exported
from penjing.fit.samples import Samples, drop_of
from penjing.load import load
from penjing.measure import median_ratio, stored_size
from penjing.model import Model
from penjing.recipe import Recipe
from penjing.result import Drop, show_drop
from penjing.tasks import Task
from penjing.tune.records import Outcome
from penjing.units import format_size, format_time
from penjing.workers import Parcel

__all__ = ["OBJECTIVES", "Shipped", "Trials", "halves"]

OBJECTIVES = ("quality", "size", "latency")

# Fewest samples of a first look: the interval of fewer says little.
_FIRST = 16
# Seconds of timing of a trial and of the original beside it.
_TIMING = 4.0


def halves(evaluation: Dataset, task: Task, model: Model, seed: int) -> tuple[Dataset, Dataset]:
    """Samples to search on and samples to report on; they share none.

    Raises:
        InputError: too few for the metric.
    """
    if len(evaluation) < 2:
        raise InputError(
            "too little data to hold a part out", got=len(evaluation),
            allowed="2 or more beside the calibration data", next="give more --data",
        )  # fmt: skip
    found, kept = split(evaluation, len(evaluation) // 2, seed)
    for part in (found, kept):
        task.check(part, model)
    return found, kept


@dataclass(eq=False)
class Trials:
    """Makes and measures trials.

    Attributes:
        model: the original.
        make: a network, a recipe and calibration data to the edited network.
        samples: `evaluation` is what is searched on.
        bench: with the same evaluation data.
        objectives: some of `OBJECTIVES`, in the order of an outcome's values.
        budget: limits.
        runtime: that runs the exported files.
    """

    model: Model
    make: Callable[[Model, Recipe, Dataset], Model]
    samples: Samples
    bench: Bench
    objectives: tuple[str, ...]
    budget: Budget
    runtime: str

    @cached_property
    def reference(self) -> Predictor:
        return torch_predictor(self.model)

    @cached_property
    def original(self) -> Exported:
        """The original's export, evaluated.

        Raises:
            InputError: the runtime does not take the network.
        """
        found = self.bench.export(self.model, "original", self.runtime)
        if found is None:
            raise InputError(
                f"the runtime {self.runtime} does not take this model", got=self.bench.notes[-1]
            )
        self.bench.start(found, self.reference)
        return found

    @cached_property
    def _first(self) -> Callable[[Model], Drop]:
        """Drop of an edited network on the first part of the search samples."""
        count = len(self.samples.evaluation) // 4
        if count < _FIRST:
            return lambda _: Drop(0.0, 0.0, 0.0, 0.95, 0, self.bench.task.relative)
        part = replace(self.samples, calibration=self.samples.evaluation.spread(count))
        return drop_of(self.model, part, self.bench.task, self.bench.length, self.bench.seed, [])

    def prepare(self) -> None:
        """Measure the original, so that the first trial takes no longer than others.

        Raises:
            InputError: the runtime does not take the network, or the data are not enough.
        """
        _ = self.original, self._first

    def made(self, recipe: Recipe) -> Model:
        """The edited network."""
        return self.make(self.model, recipe, self.samples.calibration)

    def __call__(self, recipe: Recipe, bar: float = math.inf) -> Outcome:
        """The outcome of a recipe.

        Args:
            bar: the drop that some trial before it has at the most.

        Raises:
            PenjingError: a step or the export fails.
        """
        # A module that was run refers to itself: copies stay until a collection.
        gc.collect()
        original = self.original
        edited = self.made(recipe)
        first = self._first(edited)
        figures: dict[str, float] = {}
        if first.samples:
            figures = {"first": first.value, "first_low": first.low, "first_high": first.high}
            if (hopeless := self._hopeless(first, bar)) is not None:
                return replace(hopeless, figures=figures)
        # What is said of a trial depends on the trial alone: its folder has no number.
        try:
            exported = self.bench.export(edited, "trial", self.runtime)
            if exported is None:
                raise InputError(self.bench.notes.pop())
            return self._measured(original, exported, figures)
        finally:
            for folder in self.bench.folder.glob("trial-*"):
                shutil.rmtree(folder, ignore_errors=True)

    def _hopeless(self, first: Drop, bar: float) -> Outcome | None:
        """What is known beyond doubt after the first part of the samples."""
        allowed = self.budget.max_drop
        shown = show_drop(first.low, self.bench.task.metric, first.relative)
        what = f"a drop of at least {shown} on {first.samples} samples"
        if allowed is not None and first.low > allowed:
            limits = {"drop": first.low - allowed}
            return Outcome("pruned", limits=limits, early=first.value, why=what)
        if self.objectives == ("quality",) and first.low > bar:
            return Outcome("pruned", early=first.value, why=f"{what}, another has less")
        return None

    def _measured(
        self, original: Exported, exported: Exported, figures: dict[str, float]
    ) -> Outcome:
        size = stored_size(exported.file.path)
        figures["size_bytes"] = size
        limits: dict[str, float] = {}
        if self.budget.max_size is not None:
            limits["size"] = size / self.budget.max_size - 1
            if limits["size"] > 0:
                return Outcome("pruned", limits=limits, figures=figures, why=format_size(size))
        if "latency" in self.objectives or self.budget.max_latency is not None:
            was, now = self.bench.time([original, exported], _TIMING)
            median = now.measurement.latency_ms.median
            # A share of the original's of the same run: the weather of a machine changes.
            figures |= {"latency_ms": median, "latency": 1 / median_ratio(was, now)}
            if self.budget.max_latency is not None:
                limits["latency"] = median / 1e3 / self.budget.max_latency - 1
                if limits["latency"] > 0:
                    why = format_time(median / 1e3)
                    return Outcome("pruned", limits=limits, figures=figures, why=why)
        after = self.bench.evaluate(exported, self.reference)
        before = self.bench.before
        if after is None or before is None:
            raise UsageError("a trial needs data", next="give --data")
        drop = compare(before, after, self.bench.task, confidence=self.bench.confidence,
                       seed=self.bench.seed)  # fmt: skip
        figures |= {
            "quality": after.value, "drop": drop.value, "drop_low": drop.low,
            "drop_high": drop.high,
        }  # fmt: skip
        if self.budget.max_drop is not None:
            limits["drop"] = drop.value - self.budget.max_drop
        values = {"quality": drop.value, "size": float(size), "latency": figures.get("latency")}
        chosen = tuple(v for name in self.objectives if (v := values[name]) is not None)
        return Outcome("complete", chosen, limits, figures=figures)


@dataclass(frozen=True)
class Shipped:
    """How a worker gets its own trials.

    Attributes:
        parcel: an artifact, the original.
        trials: whose model is not sent.
    """

    parcel: Parcel
    trials: Trials

    def __call__(self, folder: Path) -> Trials:
        """Trials that use `folder`, ready to begin."""
        bench = replace(self.trials.bench, folder=folder, notes=[])
        made = replace(self.trials, model=load(self.parcel.open(folder)), bench=bench)
        made.prepare()
        return made
