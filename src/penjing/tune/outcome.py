"""The outcome of a search: what was chosen, its figures on samples that no trial saw, the files.

OUT                      the artifact of the chosen trial
OUT/tuning.json          the search: space, trials, front, importances
OUT/front/trial-7.toml   a recipe for each trial of the front
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from penjing.data import Dataset
from penjing.errors import BudgetError, InputError
from penjing.files import write_json
from penjing.fit import Budget, Settings
from penjing.fit.bench import Bench, Trial
from penjing.fit.outcome import certainty, public, versions, write
from penjing.progress import task as progress
from penjing.recipe import Recipe
from penjing.result import Point, Result
from penjing.tune.best import best_of, front, importances
from penjing.tune.records import Record
from penjing.tune.space import Space
from penjing.tune.trials import Trials

__all__ = ["Found", "Tuned", "found_of", "prove"]


@dataclass(frozen=True)
class Found:
    """What a search came to.

    Attributes:
        best: the trial that was chosen.
        front: trials within the limits that no other beats.
        table: of `tuning.json`.
    """

    space: Space
    best: Record
    front: list[Record]
    table: dict[str, Any]

    @property
    def recipe(self) -> Recipe:
        """Of the best trial."""
        return self.space.recipe_of(self.best.params)

    def write(self, folder: Path) -> None:
        """`tuning.json`, and the recipes of the front."""
        write_json(folder / "tuning.json", self.table)
        (folder / "front").mkdir()
        for record in self.front:
            text = self.space.recipe_of(record.params).to_toml()
            (folder / "front" / f"trial-{record.number}.toml").write_text(text, encoding="utf-8")


@dataclass(frozen=True)
class Tuned:
    """What `penjing.tune` gives back.

    Attributes:
        recipe: the recipe that was chosen.
        params: its values by name.
        trials: every finished one, in order.
        front: those within the limits that no other beats.
        importances: by objective and name, shares that add up to 1; empty where there are too few
            trials.
        result: figures of the artifact; None where the objective is a function.
    """

    recipe: Recipe
    params: dict[str, float | str]
    trials: tuple[Record, ...]
    front: tuple[Record, ...]
    importances: dict[str, dict[str, float]]
    result: Result | None


def found_of(space: Space, records: Sequence[Record], names: Sequence[str], search: dict[str, Any],
             ) -> Found:  # fmt: skip
    """Choose.

    Args:
        names: of the objectives.
        search: what the search is.

    Raises:
        BudgetError: no trial came to any figures.
    """
    best = best_of(records)
    if best is None:
        why = records[-1].outcome.why if records else "no time for a trial"
        raise BudgetError("no trial could be made", got=why, next="search among other values")
    points = front(records)
    shares, note = importances(space, records, names)
    table = {
        "format": 1, "search": search, "best": best.number, "front": [r.number for r in points],
        "importances": shares, "importance_note": note or None,
        "trials": [r.to_json() for r in records],
    }  # fmt: skip
    return Found(space, best, points, table)


def prove(
    trials: Trials, held_out: Dataset, found: Found, output: Path, settings: Settings,
    budget: Budget, overwrite: bool,
) -> Result:  # fmt: skip
    """Make the chosen one again, measure it on the samples held out, and write the artifact.

    Raises:
        InputError: it cannot be exported now, or the folder cannot be written.
    """
    bench = dataclasses.replace(trials.bench, dataset=held_out, before=None)
    recipe = found.recipe
    with progress("the chosen trial on samples held out"):
        bench.start(trials.original, trials.reference)
        exported = bench.export(trials.made(recipe), "best", trials.runtime)
        if exported is None:
            raise InputError("the chosen trial cannot be exported", got=bench.notes[-1])
        trial = bench.trial(exported, trials.reference)
    result = _result(trial, trials, found, bench, budget)
    write(exported, recipe, result, output, overwrite, settings.command, tuning=found.table,
          more=found.write)  # fmt: skip
    return result


def _result(trial: Trial, trials: Trials, found: Found, bench: Bench, budget: Budget) -> Result:
    task = bench.task
    over = budget.excess(trial.measured, trial.drop, task.metric)
    words = ", ".join(f"{axis.name} = {found.best.params[axis.name]}" for axis in found.space.axes)
    notes = [*bench.notes, f"trial {found.best.number} was chosen: {words}"]
    if over and found.best.outcome.within:
        notes.append("on the samples of the search it was within the limits")
    return Result(
        task=type(task).__name__.lower(),
        metric=task.metric,
        runtime=trials.runtime,
        threads=bench.threads,
        before=trial.baseline,
        after=trial.measured,
        drop=trial.drop,
        budget=budget.to_json(),
        met=not over,
        why="; ".join(text for _, text in over.values()) or None,
        front=tuple(_points(trial, found)),
        notes=tuple(public([*notes, *certainty(trial.drop)], trials.model, bench)),
        seed=bench.seed,
        versions=versions(),
        higher_is_better=task.higher_is_better,
    )


def _points(trial: Trial, found: Found) -> list[Point]:
    """The front as far as its latency is known, against the original of the last run."""
    base = trial.baseline.latency_ms.median
    return [
        Point(
            figures["size_bytes"], base * figures["latency"], figures["quality"],
            found.space.recipe_of(record.params).to_toml(), True,
            f"trial {record.number}, quality on the samples of the search",
        )
        for record in found.front
        if "latency" in (figures := record.outcome.figures)
    ]  # fmt: skip
