"""The outcome of a fit: results.json, the report and the artifact folder."""

from __future__ import annotations

import importlib.metadata
import itertools
import math
import shlex
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from penjing.apply import Done
from penjing.errors import InputError
from penjing.files import write_json
from penjing.fit.bench import Bench, Exported, Trial
from penjing.fit.budget import Budget
from penjing.fit.predict import Prediction
from penjing.fit.space import Choice
from penjing.fit.survey import Survey
from penjing.model import Model
from penjing.recipe import Recipe
from penjing.report import render
from penjing.result import Drop, Point, Result, Unit
from penjing.tasks import Task
from penjing.writers.artifact import save

__all__ = ["Made", "certainty", "public", "result_of", "versions", "write"]


@dataclass
class Made:
    """A candidate and how it came out."""

    choice: Choice
    said: Prediction
    trial: Trial
    recipe: Recipe
    done: list[Done] = field(default_factory=list)


def result_of(
    model: Model,
    best: Made,
    front: list[Made],
    budget: Budget,
    task: Task,
    bench: Bench,
    found: Survey,
) -> Result:
    """results.json of the best candidate, with every measured point."""
    over = budget.excess(best.trial.measured, best.trial.drop, task.metric)
    was = best.trial.baseline
    points = []
    for made in front:
        now = made.trial.measured
        # Latency against the original of the same run, so that points of all runs compare.
        latency = was.latency_ms.median / made.trial.ratio
        points.append(
            Point(now.size_bytes, latency, now.quality, made.recipe.to_toml(), True,
                  made.choice.describe(), _said(made.said))
        )  # fmt: skip
    return Result(
        task=type(task).__name__.lower(),
        metric=task.metric,
        device=bench.place,
        runtime=best.trial.exported.runtime,
        threads=bench.threads,
        before=was,
        after=best.trial.measured,
        drop=best.trial.drop,
        budget=budget.to_json(),
        met=not over,
        why="; ".join(text for _, text in over.values()) or None,
        front=tuple(points),
        units=tuple(_units(model, best, found)),
        notes=tuple(public([*bench.notes, *certainty(best.trial.drop)], model, bench)),
        seed=bench.seed,
        versions=versions(),
        higher_is_better=task.higher_is_better,
    )


def _said(said: Prediction) -> dict[str, float]:
    found = {"size_bytes": said.size, "latency_ms": said.latency * 1e3, "drop": said.drop}
    # A part that was never measured is taken for infinitely bad, which is no prediction.
    return {name: value for name, value in found.items() if math.isfinite(value)}


def public(notes: Iterable[str], model: Model, bench: Bench) -> Iterator[str]:
    """Notes without the folders of this machine."""
    place = str(model.source.path)
    for note in notes:
        yield note.replace(f"{bench.folder}/", "").replace(place, Path(place).name)


def certainty(drop: Drop | None) -> Iterator[str]:
    """What an interval of no width means: no sample changed, so no resample differs."""
    if drop is not None and (most := drop.unseen) is not None:
        yield (
            f"none of {drop.samples} samples changed the metric, so its interval is [0, 0]; with "
            f"{drop.confidence:.0%} confidence at most {most:.2%} of all samples would change"
        )


def _command(command: str) -> str:
    """The command as it is to be typed, absolute paths by their names."""
    words = [Path(w).name if Path(w).is_absolute() else w for w in shlex.split(command)]
    return shlex.join(words)


def _units(model: Model, best: Made, found: Survey) -> Iterator[Unit]:
    choice = best.choice
    for i, block in enumerate(model.blocks):
        alone = found.cuts.get(str(i))
        why = f"cutting it alone costs {alone:.4f} of output error" if alone is not None else ""
        if i in choice.cut:
            yield Unit(block, "cut", why + "; a linear patch stands in" * (alone is not None))
        else:
            error = found.formats.get(choice.formats[i], {}).get(str(i))
            if error is not None:
                why += "; " * bool(why) + f"{choice.formats[i]} costs {error:.5f} of output error"
            width, heads = choice.size(i)
            done = choice.formats[i]
            done += f", {width:.0%} of the hidden units" if width < 1 else ""
            done += f", {heads:.0%} of the heads" if heads < 1 else ""
            yield Unit(block, done, why)
    if choice.table in found.tables:
        error = found.tables[choice.table]
        yield Unit("embeddings", f"{choice.table[1:]} bits", f"costs {error:.5f} of output error")
    rest = found.rest.get(choice.rest)
    if rest is not None:
        yield Unit("outside the blocks", choice.rest, f"costs {rest:.5f} of output error")
    for step, edits in itertools.groupby(best.done, key=lambda d: d.step):
        if step == "recover":
            yield Unit("all weights", "recover", next(iter(edits)).why)


def versions() -> dict[str, str]:
    names = ("penjing", "torch", "transformers", "onnx", "onnxruntime", "openvino")
    found = {}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def write(
    exported: Exported, recipe: Recipe, result: Result, output: Path, overwrite: bool,
    command: str, tuning: Mapping[str, Any] | None = None,
    more: Callable[[Path], None] | None = None,
) -> None:  # fmt: skip
    """The artifact folder: weights, the exported file, results and report.

    `tuning` is what the page shows of a search; `more` adds files of its own.
    """

    def extra(folder: Path) -> None:
        if not exported.file.path.exists():
            raise InputError("the exported file is gone", got=exported.file.path)
        shutil.copytree(exported.folder, folder, dirs_exist_ok=True)
        write_json(folder / "results.json", result.to_json())
        page = render(result, title=output.name, recipe_toml=recipe.to_toml(),
                      command=_command(command), trainings=exported.model.curves,
                      tuning=tuning)  # fmt: skip
        (folder / "report.html").write_text(page, encoding="utf-8")
        if more is not None:
            more(folder)

    metrics = {"quality": result.after.quality, "size_bytes": result.after.size_bytes}
    save(exported.model, output, recipe=recipe, extra=extra, metrics=metrics,
         overwrite=overwrite)  # fmt: skip
