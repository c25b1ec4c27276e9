"""The loop: measure the original, survey, solve, make a candidate, measure it, correct, again.

It ends when a measured artifact meets the budget, or when nothing that is left could; then the
nearest one is kept and the reason given.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from penjing.apply import Done, apply
from penjing.data import Dataset
from penjing.errors import BudgetError, InputError, PenjingError
from penjing.evaluate import torch_predictor
from penjing.files import check_output, disk_errors
from penjing.fit.bench import Bench, Exported, runtimes_here
from penjing.fit.budget import Budget
from penjing.fit.check import preflight
from penjing.fit.choose import candidates, uniform
from penjing.fit.outcome import Made, result_of, write
from penjing.fit.predict import Prediction, Predictor
from penjing.fit.samples import Samples, about, divide, drop_of
from penjing.fit.space import FORMATS, Choice, formats_for, recipe_of
from penjing.fit.survey import Survey, survey
from penjing.measure import physical_cores
from penjing.model import Model
from penjing.progress import task as progress
from penjing.recipe import Recipe
from penjing.result import Result
from penjing.tasks import Task

__all__ = ["Settings", "fit"]


@dataclass(frozen=True)
class Settings:
    """How a fit works, besides the budget.

    Attributes:
        runtime: name, or None to choose by measurement.
        batch, length: of the latency that counts.
        threads: None for the physical cores.
        confidence: of the drop's interval.
        seed: of splits and bootstrap.
        tries: candidates made at the most.
        recover: seconds of distillation of a candidate, 0 for none.
        patience: seconds after which a found artifact is good enough.
        command: as typed, for the report.
    """

    runtime: str | None = None
    batch: int = 1
    length: int = 128
    threads: int | None = None
    confidence: float = 0.95
    seed: int = 0
    tries: int = 4
    recover: float = 20.0
    patience: float = 200.0
    command: str = ""


def fit(
    model: Model,
    dataset: Dataset,
    output: Path,
    task: Task,
    budget: Budget,
    settings: Settings,
    *,
    calibration: Dataset | None = None,
    overwrite: bool = False,
) -> Result:
    """Find, make and prove the smallest and fastest artifact within a budget.

    Args:
        model: the trained network; stays as it is.
        dataset: what quality is measured on; calibration is split off without `calibration`.
        output: artifact folder.
        task: the quality measure.
        budget: limits.
        settings: how to work.
        calibration: data that edits are fitted to.

    Returns:
        The result; `met` says whether the budget was met, the artifact is there either way.

    Raises:
        InputError: unusable data, an existing output, no runtime that takes the model.
    """
    check_output(output, overwrite)
    notes: list[str] = []
    start = time.monotonic()
    if budget.within is not None:  # the survey has a quarter of the time
        settings = replace(settings, recover=min(settings.recover, budget.within / 4))
    data = divide(model, dataset, calibration, task, settings.length, settings.seed, notes)
    with disk_errors(output), _workspace(output) as folder:
        bench = Bench(
            folder, data.evaluation, task, settings.batch, settings.length,
            settings.threads or physical_cores(), settings.confidence, settings.seed, notes=notes,
        )  # fmt: skip
        reference = torch_predictor(model)
        with progress("preflight"):
            notes += preflight(
                model, folder, runtimes_here(settings.runtime), bench.threads, settings.length,
                len(data.evaluation),
            )  # fmt: skip
        with progress("measuring the original and plain number formats"):
            original, plain, latencies = _baselines(model, data, bench, settings)
            bench.start(original, reference)
        limit = 3 * budget.max_drop if budget.max_drop is not None else 0.1
        seconds = 0.25 * budget.within if budget.within else 90.0
        found = survey(
            model, data.edits, data.search,
            drop_of(model, data, task, settings.length, settings.seed, notes), formats_for(model),
            limit=limit, seconds=seconds, about=about(data, task, settings.length),
        )  # fmt: skip
        notes.append(f"survey: {found.evaluations} networks evaluated in {found.seconds:.0f} s")
        predictor = Predictor(model, found, latencies, _slope(found))
        made = _search(model, data, bench, predictor, budget, settings, original.runtime, start)
        front = [*made]
        if plain is not None and not any(m.choice == plain[0] for m in made):
            with _failing(notes, "the plain version"):
                trial = bench.trial(plain[1], reference)
                front.append(Made(plain[0], predictor(plain[0]), trial, plain[2]))
        if not front:
            raise BudgetError("no candidate could be made", got="; ".join(notes[-3:]))
        best = min(front, key=lambda m: _rank(m, budget))
        result = result_of(model, best, front, budget, task, bench, found)
        write(best, result, output, overwrite, settings.command)
    return result


def _baselines(
    model: Model, data: Samples, bench: Bench, settings: Settings
) -> tuple[Exported, tuple[Choice, Exported, Recipe] | None, dict[str, float]]:
    """The original's export in the best runtime, the plain low-bit one, seconds by format."""
    names = formats_for(model)
    empty = Predictor(model, Survey(), dict.fromkeys(FORMATS, 1.0), 1.0)
    versions: dict[str, tuple[Choice, Model, Recipe]] = {}
    for name in names:
        if name != "fp32":
            choice = uniform(empty, name, "e8")
            recipe = recipe_of(model, choice, method="rtn", seed=settings.seed)[1]
            versions[name] = (choice, apply(model, recipe, data.edits).model, recipe)
    exports: dict[tuple[str, str], Exported] = {}
    for runtime in runtimes_here(settings.runtime):
        if (plain := bench.export(model, "original", runtime)) is None:
            continue
        exports[runtime, "fp32"] = plain
        for name, (_, edited, _recipe) in versions.items():
            if (small := bench.export(edited, f"plain-{name}", runtime)) is not None:
                exports[runtime, name] = small
    if not exports:
        raise InputError("no runtime takes this model", got="; ".join(bench.notes[-2:]))
    measured = dict(zip(exports, bench.time(list(exports.values()), 12.0), strict=True))
    times = {key: m.measurement.latency_ms.median / 1e3 for key, m in measured.items()}
    runtime, fastest = min(times, key=lambda key: times[key])
    for key, seconds in times.items():
        bench.notes.append(f"{key[1]} in {key[0]}: {seconds * 1e3:.2f} ms")
    latencies = {name: times.get((runtime, name), times[runtime, "fp32"]) for name in FORMATS}
    low = next((n for n in (fastest, *names) if n != "fp32" and (runtime, n) in exports), None)
    plain_version = None
    if low is not None:
        choice, _, recipe = versions[low]
        plain_version = (choice, exports[runtime, low], recipe)
    return exports[runtime, "fp32"], plain_version, latencies


def _slope(found: Survey) -> float:
    """Drop of the metric per unit of error, least squares over the ladder."""
    pairs = [(d.error, max(0.0, d.drop)) for d in found.ladder]
    weight = sum(e * e for e, _ in pairs)
    return max(0.05, sum(e * d for e, d in pairs) / weight) if weight else 1.0


def _search(
    model: Model,
    data: Samples,
    bench: Bench,
    predictor: Predictor,
    budget: Budget,
    settings: Settings,
    runtime: str,
    start: float,
) -> list[Made]:
    """Make and measure candidates until one meets the budget and nothing better is in sight."""
    made: list[Made] = []
    failed: set[Choice] = set()
    good: list[Choice] = []
    ceiling = float("inf")
    slowest = 0.0
    for number in range(settings.tries):
        spent = time.monotonic() - start
        if made and budget.within is not None and spent + slowest > budget.within:
            bench.notes.append(f"stopped after {spent:.0f} s, --within is {budget.within:.0f} s")
            break
        if good and spent + slowest > settings.patience:
            break
        began = time.monotonic()
        left = [
            (c, p)
            for c, p in candidates(predictor, budget, formats_for(model))
            if c not in failed and p.error < 0.9 * ceiling
        ]
        if not left:
            break
        choice, said = left[0]
        best = min((predictor(c).gain(predictor.plain) for c in good), default=float("inf"))
        if said.gain(predictor.plain) > 0.95 * best:
            break
        failed.add(choice)
        one = None
        with _failing(bench.notes, f"candidate {number + 1} ({choice.describe()})"):
            one = _make(model, data, bench, choice, said, settings, runtime, number)
        slowest = max(slowest, time.monotonic() - began)
        if one is None:
            continue
        made.append(one)
        measured = one.trial.measured
        over = budget.excess(measured, one.trial.drop)
        good += [] if over else [choice]
        was = one.trial.baseline.latency_ms.median / 1e3
        predictor.correct(choice, measured.size_bytes, was / one.trial.ratio)
        if one.trial.drop is not None:
            ratio = one.trial.drop.value / max(said.drop, 1e-4)
            predictor.slope *= min(4.0, max(1.5, ratio)) if "drop" in over else 0.7
        if "drop" in over:
            ceiling = min(ceiling, said.error)  # only less error can help
    return made


def _make(
    model: Model,
    data: Samples,
    bench: Bench,
    choice: Choice,
    said: Prediction,
    settings: Settings,
    runtime: str,
    number: int,
) -> Made | None:
    few = any(FORMATS[f].bits < 8 for f in (*choice.formats, choice.rest))
    structural, numbers = recipe_of(
        model, choice, method="gptq" if few else "rtn", recover=settings.recover,
        seed=settings.seed,
    )  # fmt: skip
    with progress(f"candidate {number + 1}: {choice.describe()}"):
        done: list[Done] = []
        edited = model
        if structural.steps:
            # Everything is given to distillation; a cut and its patch need far less.
            shape = Recipe(tuple(s for s in structural.steps if s.name != "recover"), settings.seed)
            first = apply(model, shape, data.edits)
            train = Recipe(tuple(s for s in structural.steps if s.name == "recover"))
            second = apply(first.model, train, data.everything, original=model)
            edited, done = second.model, first.done + second.done
        last = apply(edited, numbers, data.edits)
        exported = bench.export(last.model, f"candidate-{number}", runtime)
        if exported is None:
            return None
        trial = bench.trial(exported, torch_predictor(model))
    recipe = Recipe(structural.steps + numbers.steps, settings.seed)
    return Made(choice, said, trial, recipe, done + last.done)


def _rank(made: Made, budget: Budget) -> tuple[float, float]:
    """Least over the budget first, then smallest and fastest."""
    over = budget.excess(made.trial.measured, made.trial.drop)
    was, now = made.trial.baseline, made.trial.measured
    gain = now.size_bytes / was.size_bytes + 1 / max(made.trial.ratio, 1e-9)
    return max((ratio for ratio, _ in over.values()), default=0.0), gain


@contextmanager
def _failing(notes: list[str], what: str) -> Iterator[None]:
    """One candidate that fails is a note of the report, not the end of a fit."""
    try:
        yield
    except PenjingError as error:
        notes.append(f"{what} failed: {error}")


@contextmanager
def _workspace(output: Path) -> Iterator[Path]:
    """A folder beside the output for candidates; it is removed whatever happens."""
    folder = Path(tempfile.mkdtemp(prefix=f".{output.name}.work.", dir=output.absolute().parent))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
