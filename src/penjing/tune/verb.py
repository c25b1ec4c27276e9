"""The verb, made ready: what is given becomes a search of one kind or of the other."""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from penjing.data import Dataset
from penjing.errors import UsageError
from penjing.files import check_output
from penjing.fit import Budget, Settings
from penjing.given import Place as Given
from penjing.given import dataset_of, network_of
from penjing.model import Model
from penjing.recipe import Recipe
from penjing.registry import attribute_of
from penjing.tasks import find
from penjing.tune import quest
from penjing.tune.outcome import Tuned
from penjing.tune.propose import check_optuna
from penjing.tune.quest import Cost, Place, Quest
from penjing.tune.space import parse
from penjing.workers import Where

__all__ = ["tune"]

_USUAL = {
    "trials": 40,
    "samples": 128,
    "batch": 1,
    "length": 128,
    "seed": 0,
    "confidence": 0.95,
    "concurrency": 4,
}


def tune(
    model: Model | Given,
    recipe: Recipe,
    search: Sequence[str],
    output: Path,
    *,
    make: Callable[..., Model],
    data: Dataset | Given | None = None,
    calibration: Dataset | Given | None = None,
    objective: str | Sequence[str] | Cost = "quality",
    trials: int = 40,
    samples: int = 128,
    task: Any = None,
    max_drop: float | None = None,
    max_size: int | None = None,
    max_latency: float | None = None,
    within: float | None = None,
    runtime: str | None = None,
    batch: int = 1,
    length: int = 128,
    threads: int | None = None,
    seed: int = 0,
    confidence: float = 0.95,
    storage: str | None = None,
    journal: Given | None = None,
    concurrency: int = 4,
    workers: int | None = None,
    ray: str | None = None,
    insecure: bool = False,
    overwrite: bool = False,
) -> Tuned:
    """As `penjing.tune`, with `penjing.apply` as `make`."""
    lines = tuple(line for text in search for line in text.split())
    space = parse(recipe, lines)
    if trials < 1:
        raise UsageError("trials", got=trials, allowed="1 or more")
    where = Where(workers, ray, threads or 1, insecure)
    if concurrency < max(1, workers or 0):
        raise UsageError("concurrency", got=concurrency, allowed=f"{workers or 1} or more",
                         next="give as many as there are workers, or fewer workers")  # fmt: skip
    if storage is not None and journal is not None:
        raise UsageError("storage and journal", allowed="one of them")
    check_optuna()
    check_output(output, overwrite)
    names, cost = _objective(objective)
    budget = Budget(max_drop, max_size, max_latency, None, within)
    loaded = network_of(model, "tune")
    length = loaded.at_most(length)
    settings = Settings(runtime, batch, length, threads, confidence, seed)
    place = Place(output, storage, None if journal is None else Path(journal), overwrite)
    asked = Quest(space, lines, trials, settings, budget, concurrency, where)
    if cost is not None:
        if limits := [k for k in budget.to_json() if k != "within"]:
            raise UsageError(f"{limits[0]} with a function as the objective",
                             next="leave it out: nothing is measured then")  # fmt: skip
        return quest.tune_cost(
            loaded, place, asked, cost, names,
            lambda chosen: make(loaded, chosen, data, samples=samples, length=length),
        )  # fmt: skip
    if data is None:
        raise UsageError("tune needs data", next="give --data")
    dataset = dataset_of(data)
    given: dict[str, Any] = {"data": data, "calibration": calibration, "metric": task}
    given |= {name.replace("_", "-"): value for name, value in budget.to_json().items()}
    given |= {"runtime": runtime, "trials": trials, "samples": samples, "batch": batch,
              "length": length, "seed": seed, "confidence": confidence,
              "concurrency": concurrency, "workers": workers}  # fmt: skip
    words = ["penjing", "tune", loaded.source.path, "recipe.toml"]
    words += [w for line in lines for w in ("--search", line)]
    words += [w for name in names for w in ("--objective", name)]
    words += [w for k, v in given.items() if isinstance(v, str | os.PathLike | float | int)
              and v != _USUAL.get(k) for w in (f"--{k}", f"{v}")]  # fmt: skip
    settings = replace(settings, command=shlex.join([*words, "-o", output.name]))
    return quest.tune(
        loaded, dataset, place, replace(asked, settings=settings),
        find(task, dataset, loaded), names, partial(make, samples=samples, length=length),
        samples=samples, calibration=None if calibration is None else dataset_of(calibration),
    )  # fmt: skip


def _objective(objective: str | Sequence[str] | Cost) -> tuple[tuple[str, ...], Cost | None]:
    """Names of the objectives; and the function, where it is one."""
    if callable(objective):
        return (getattr(objective, "__name__", "cost"),), objective
    names = (objective,) if isinstance(objective, str) else tuple(objective)
    if any(":" in name for name in names):
        if len(names) > 1:
            raise UsageError("a function beside other objectives", got=", ".join(names),
                             next="give it alone")  # fmt: skip
        return names, attribute_of(names[0])
    quest.check_objectives(names)
    return names, None
