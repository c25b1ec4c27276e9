"""A search: what is looked for, where its trials are kept, and what comes out."""

from __future__ import annotations

import math
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from penjing.data import Dataset
from penjing.errors import UsageError
from penjing.files import check_output, disk_errors, folder_beside
from penjing.fit import Budget, Settings
from penjing.fit.bench import Bench, runtimes_here
from penjing.fit.samples import about, divide
from penjing.measure import physical_cores
from penjing.model import Model
from penjing.recipe import Recipe
from penjing.result import Result
from penjing.tasks import Task
from penjing.tune.database import Database, lock_of, safe_url
from penjing.tune.outcome import Found, Tuned, found_of, prove
from penjing.tune.records import Journal, Outcome, Record, Store, alone
from penjing.tune.search import Attempts, Evaluate, search
from penjing.tune.space import Space
from penjing.tune.trials import OBJECTIVES, Shipped, Trials, halves
from penjing.workers import Crew, Where, crew
from penjing.writers.artifact import save

__all__ = ["Cost", "Costs", "Place", "Quest", "check_objectives", "tune", "tune_cost"]

_TRIALS = "trials.jsonl"
# The chosen one is made again and timed longer, with its original: so many of the slowest trial.
_AFTER = 1.5

Cost = Callable[[Recipe], float | Sequence[float]]


@dataclass(frozen=True)
class Place:
    """Where finished trials and the artifact go.

    Attributes:
        output: the artifact.
        storage: URL of a database of the user's own.
        journal: folder of the trials; by default beside the output, and gone with the end.
    """

    output: Path
    storage: str | None = None
    journal: Path | None = None
    overwrite: bool = False

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Hold the search; what is kept of it goes when the body succeeds."""
        check_output(self.output, self.overwrite)
        where = safe_url(self.storage) if self.storage is not None else str(self._folder)
        with alone(self._lock, where):
            # Another process may have come to the end just now.
            check_output(self.output, self.overwrite)
            try:
                yield
            except BaseException:
                # Without a finished trial there is nothing to go on from.
                self._forget(only_empty=True)
                raise
            self._forget()

    def _forget(self, only_empty: bool = False) -> None:
        kept = self._folder / _TRIALS
        if only_empty and kept.exists() and kept.read_bytes().count(b"\n") > 1:
            return
        if self.journal is None and self.storage is None:
            shutil.rmtree(self._folder, ignore_errors=True)

    def store(self, what: dict[str, Any], quest: Quest, objectives: int) -> Store:
        """Where the trials of this search are kept."""
        if self.storage is not None:
            return Database(self.storage, self.output.name, what, quest.space, objectives,
                            quest.concurrency)  # fmt: skip
        return Journal(self._folder / _TRIALS, what, quest.concurrency)

    @property
    def _folder(self) -> Path:
        return self.journal or self.output.with_name(self.output.name + ".journal")

    @property
    def _lock(self) -> Path:
        if self.storage is not None:
            return lock_of(self.storage, self.output.name)
        return self._folder / "lock"


@dataclass(frozen=True)
class Quest:
    """What is searched for.

    Attributes:
        space: where.
        lines: that describe it.
        trials: at the most.
        settings: of the measurements; its seed is that of the search too.
        budget: limits, and the time of the whole.
        concurrency: trials that may be made at once.
        where: they are made.
    """

    space: Space
    lines: tuple[str, ...]
    trials: int
    settings: Settings
    budget: Budget
    concurrency: int
    where: Where

    def search(
        self, begin: Callable[[Path], Evaluate], hands: Crew, store: Store, objectives: int,
        began: float, after: float = 0.0,
    ) -> list[Record]:  # fmt: skip
        """Search; `began` is when the time of the whole did, on the monotonic clock."""
        left = math.inf
        if self.budget.within is not None:
            left = began + self.budget.within - time.monotonic()
        hands.start(Attempts(self.space, begin))
        return search(
            self.space, hands, store, objectives=objectives, trials=self.trials,
            concurrency=self.concurrency, seed=self.settings.seed, within=left, after=after,
        )  # fmt: skip

    def facts(self, model: Model, objectives: Sequence[str], **more: Any) -> dict[str, Any]:
        """What a search that goes on must have in common with the one before."""
        limits = {k: v for k, v in self.budget.to_json().items() if k != "within"}
        return {
            "space": list(self.lines), "recipe": self.space.recipe.to_toml(),
            "model": f"{model.source.fingerprint} {model.recipe.to_toml() if model.recipe else ''}",
            "objectives": list(objectives), "limits": limits, "seed": self.settings.seed,
            "concurrency": self.concurrency, **more,
        }  # fmt: skip


def tune(
    model: Model,
    dataset: Dataset,
    place: Place,
    quest: Quest,
    task: Task,
    objectives: Sequence[str],
    make: Callable[[Model, Recipe, Dataset], Model],
    *,
    samples: int,
    calibration: Dataset | None = None,
) -> Tuned:
    """Search, measure what was chosen on samples that no trial saw, and write its artifact.

    Args:
        model: the network; stays as it is.
        dataset: what quality is measured on; calibration is split off without `calibration`.
        task: the quality measure.
        objectives: of `OBJECTIVES`; several give a front, of which the most even one is chosen.
        make: a network, a recipe and calibration data to the edited network.
        samples: of calibration data, at the most.

    Raises:
        InputError: unusable data, an existing output, another process at the same search.
        BudgetError: no trial came to any figures.
    """
    began = time.monotonic()
    settings, budget = quest.settings, quest.budget
    with place.alone():
        notes: list[str] = []
        data = divide(model, dataset, calibration, task, settings.length, settings.seed, notes)
        seen, held_out = halves(data.evaluation, task, model, settings.seed)
        notes.append(f"searched on {len(seen)} samples, figures are on {len(held_out)} others")
        data = replace(data, evaluation=seen)
        runtime = runtimes_here(settings.runtime)[0]
        evaluated = replace(data, calibration=seen)
        store = place.store(
            quest.facts(
                model, objectives, runtime=runtime, samples=samples, batch=settings.batch,
                confidence=settings.confidence, calibration=about(data, task, settings.length),
                evaluation=about(evaluated, task, settings.length),
            ), quest, len(objectives),
        )  # fmt: skip
        with disk_errors(place.output), folder_beside(place.output, "work") as folder:
            bench = Bench(
                folder, seen, task, settings.batch, settings.length,
                settings.threads or physical_cores(), settings.confidence, settings.seed,
                notes=notes,
            )  # fmt: skip
            trials = Trials(model, make, data, bench, tuple(objectives), budget, runtime)
            with crew(quest.where, folder) as hands:
                begin, after = _begin(trials, hands, quest.where, folder)
                records = quest.search(begin, hands, store, len(objectives), began, after)
            found = found_of(quest.space, records, objectives, quest.facts(model, objectives))
            result = prove(trials, held_out, found, place.output, settings, budget,
                           place.overwrite)  # fmt: skip
    return _tuned(found, records, result)


def tune_cost(
    model: Model,
    place: Place,
    quest: Quest,
    cost: Cost,
    names: Sequence[str],
    make: Callable[[Recipe], Model],
) -> Tuned:
    """Search for the recipe of the least cost, by a function of the user's own.

    Nothing is measured; the artifact is the network with that recipe.

    Args:
        cost: a recipe to a number, or to as many as there are `names`; less is better.
        names: of these numbers.
        make: a recipe to the edited network.
    """
    began = time.monotonic()
    with place.alone():
        store = place.store(quest.facts(model, names), quest, len(names))
        with tempfile.TemporaryDirectory() as folder, crew(quest.where, Path(folder)) as hands:
            records = quest.search(Costs(cost, tuple(names)), hands, store, len(names), began)
        found = found_of(quest.space, records, names, quest.facts(model, names))
        save(make(found.recipe), place.output, recipe=found.recipe, extra=found.write,
             overwrite=place.overwrite)  # fmt: skip
    return _tuned(found, records, None)


def check_objectives(objectives: Sequence[str]) -> None:
    """Refuse what is none.

    Raises:
        UsageError: it lists those that are.
    """
    known = [name for name in objectives if name in OBJECTIVES]
    if not objectives or len(set(known)) < len(objectives):
        raise UsageError(
            "objective", got=", ".join(objectives),
            allowed=f"{', '.join(OBJECTIVES)}, each once, or file.py:function",
        )  # fmt: skip


@dataclass(frozen=True)
class Costs:
    """Evaluates by a function of the user's own."""

    cost: Cost
    names: tuple[str, ...]

    def __call__(self, _: Path) -> Evaluate:
        return self.outcome

    def outcome(self, recipe: Recipe, _: float) -> Outcome:
        values = self.cost(recipe)
        numbers = tuple(float(v) for v in (values if isinstance(values, Sequence) else (values,)))
        if len(numbers) != len(self.names):
            raise UsageError(f"numbers of {self.names[0]}", got=len(numbers),
                             allowed=len(self.names))  # fmt: skip
        return Outcome("complete", numbers)


def _begin(
    trials: Trials, hands: Crew, where: Where, folder: Path
) -> tuple[Callable[[Path], Evaluate], float]:
    """What makes trials in a worker, and what follows the search, in trials."""
    if where.kind == "serial":
        trials.prepare()
        return lambda _: trials, _AFTER
    # The workers build the network from an artifact of it; it holds edits made in memory too.
    save(trials.model, folder / "original")
    bare = replace(trials, model=None)  # type: ignore[arg-type]
    return Shipped(hands.ship(folder / "original"), bare), _AFTER + 1


def _tuned(found: Found, records: Sequence[Record], result: Result | None) -> Tuned:
    return Tuned(
        found.recipe, dict(found.best.params), tuple(records), tuple(found.front),
        found.table["importances"], result,
    )  # fmt: skip
