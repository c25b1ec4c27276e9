"""The loop: measure the original, survey, solve, make a candidate, measure it, correct, again.

It ends when a measured artifact meets the budget, or when nothing that is left could; then the
nearest one is kept and the reason given.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from penjing.apply import apply
from penjing.data import Dataset
from penjing.errors import BudgetError, InputError, UsageError
from penjing.evaluate import torch_predictor
from penjing.files import check_output, disk_errors, folder_beside
from penjing.fit.bench import Bench, Exported, runtimes_here
from penjing.fit.budget import Budget
from penjing.fit.check import preflight
from penjing.fit.choose import uniform
from penjing.fit.device import Device
from penjing.fit.explain import bounds, sensitivity
from penjing.fit.outcome import Made, result_of, write
from penjing.fit.predict import Predictor
from penjing.fit.samples import Samples, about, divide, drop_of, timed
from penjing.fit.search import Settings, Work, failing, search
from penjing.fit.space import FORMATS, Choice, formats_for, recipe_of
from penjing.fit.survey import Survey, survey
from penjing.measure import physical_cores
from penjing.model import Model
from penjing.progress import task as progress
from penjing.recipe import Recipe
from penjing.result import Result
from penjing.runtimes._ssh import Host
from penjing.tasks import Task

__all__ = ["fit", "knee"]

# The runtime that kits and workers on devices use.
_ON_DEVICES = "onnxruntime"


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
    with (
        disk_errors(output),
        folder_beside(output, "work") as folder,
        contextlib.ExitStack() as held,
    ):
        device, host, threads = _aimed(settings, held, notes)
        settings = settings if settings.device is None else replace(settings, runtime=_ON_DEVICES)
        bench = Bench(
            folder, data.evaluation, task, settings.batch, settings.length, threads,
            settings.confidence, settings.seed, device, host, notes,
        )  # fmt: skip
        reference = torch_predictor(model)
        with progress("preflight"):
            said, runtimes = preflight(
                model, folder, runtimes_here(settings.runtime), bench.threads, settings.length,
                len(data.evaluation),
            )  # fmt: skip
            notes += said
        with progress("measuring the original and plain number formats"):
            original, plain, latencies, memory = _baselines(model, data, bench, settings, runtimes)
        began = time.monotonic()
        with progress("evaluating the original"):
            bench.start(original, reference)
        # Another run of the same data, for the plain version; it need not be faster here.
        trial = time.monotonic() - began + 5.0
        # One of the exports and measurements just made, and distillation.
        usual = settings.recover + 0.5 * (time.monotonic() - start)
        within = budget.within or math.inf
        drops = drop_of(
            model, data, task, settings.length, settings.seed, notes, seconds=0.02 * within
        )
        remains = _remains(model, data, settings.recover)
        # A set of cuts that distillation can mend is worth knowing.
        limit = 3 * budget.max_drop / remains if budget.max_drop is not None else 0.1
        began = time.monotonic()
        # What two candidates leave; on a slow machine the first steps took so long that nothing
        # is left, but little is better. Half of it for the units, half for the sets of cut blocks.
        left = max(0.15 * within, start + within - 2 * usual - began)
        found = survey(
            model, data.edits, data.search, lambda variant: drops(variant).value,
            formats_for(model), limit=limit, seconds=min(90.0, 0.5 * left),
            about=about(data, task, settings.length), deadline=began + 0.5 * left,
            where=settings.where, folder=folder,
        )  # fmt: skip
        notes.append(_surveyed(found, time.monotonic() - began))
        predictor = Predictor(model, found, latencies, _slope(found), remains, memory)
        work = Work(
            model, data, bench, predictor, budget, settings, original.runtime, drops, start,
            usual, trial if plain is not None else 0.0,
        )  # fmt: skip
        front = search(work, [plain[0]] if plain is not None else [])
        met = any(not budget.excess(m.trial.measured, m.trial.drop) for m in front)
        # Beside a better one the plain version is only another point of the front.
        if plain is not None and (not met or time.monotonic() - start + trial < within):
            with failing(notes, "the plain version"), progress("the plain version"):
                measured = bench.trial(plain[1], reference)
                front.insert(0, Made(plain[0], predictor(plain[0]), measured, plain[2]))
        if not front:
            raise BudgetError("no candidate could be made", got="; ".join(notes[-3:]))
        if budget.is_open:
            best = knee(front)
            notes.append(f"no limits were given: the knee of {len(front) + 1} measured points")
        else:
            best = min(front, key=lambda m: _rank(m, budget))
        result = replace(
            result_of(model, best, front, budget, task, bench, found),
            sensitivity=sensitivity(model.blocks, found),
            bounds=tuple(
                bounds(best, budget, predictor, [m for m in front if m is not best], task.metric)
            ),
        )
        write(best.trial.exported, best.recipe, result, output, overwrite, settings.command)
    return result


def _aimed(
    settings: Settings, held: contextlib.ExitStack, notes: list[str]
) -> tuple[Device | None, Host | None, int]:
    """The device whose latency counts, and the threads of what is timed."""
    address = settings.device
    if address is None:
        return None, None, settings.threads or physical_cores()
    if settings.runtime not in (None, _ON_DEVICES):
        raise UsageError(
            "--runtime with --device", got=settings.runtime, allowed=_ON_DEVICES,
            next="leave --runtime out",
        )  # fmt: skip
    if address.startswith("ssh:"):
        host = held.enter_context(Host(address))
        notes.append(f"latencies and memory were measured on {address}")
        return None, host, settings.threads or host.cores
    here = physical_cores()
    with progress("timing this machine's kernels"):
        device = Device.load(Path(address), threads=settings.threads, threads_here=here)
    notes.append(device.describe())
    return device, None, here


def _baselines(
    model: Model, data: Samples, bench: Bench, settings: Settings, runtimes: list[str]
) -> tuple[Exported, tuple[Choice, Exported, Recipe] | None, dict[str, float], tuple[float, float]]:
    """The original's export in the best runtime, the plain low-bit one, seconds by format.

    And peak memory as a line over the bytes of the file: at 0, and a byte.
    """
    names = formats_for(model)
    empty = Predictor(model, Survey(), dict.fromkeys(FORMATS, 1.0), 1.0)
    versions: dict[str, tuple[Choice, Model, Recipe]] = {}
    for name in names:
        if name != "fp32":
            choice = uniform(empty, name, "e8")
            recipe = recipe_of(model, choice, method="rtn", seed=settings.seed)[1]
            versions[name] = (choice, apply(model, recipe, data.edits).model, recipe)
    exports: dict[tuple[str, str], Exported] = {}
    spare = [r for r in runtimes_here(settings.runtime) if r not in runtimes]
    for runtime in (*runtimes, *spare):
        if runtime in spare and exports:
            break
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
    runtime = min(times, key=lambda key: times[key])[0]
    for key, seconds in times.items():
        bench.notes.append(f"{key[1]} in {key[0]}: {seconds * 1e3:.2f} ms")
    latencies = {name: times.get((runtime, name), times[runtime, "fp32"]) for name in FORMATS}
    low = _safest({n: times[runtime, n] for n in names if n != "fp32" and (runtime, n) in times})
    plain_version = None
    large, each = measured[runtime, "fp32"].measurement, 1.0
    if low is not None:
        choice, _, recipe = versions[low]
        plain_version = (choice, exports[runtime, low], recipe)
        little = measured[runtime, low].measurement
        if little.size_bytes < large.size_bytes:
            each = (large.peak_memory_bytes - little.peak_memory_bytes) / (
                large.size_bytes - little.size_bytes
            )
    each = max(0.1, each)  # noise must not turn the line round
    memory = (large.peak_memory_bytes - each * large.size_bytes, each)
    return exports[runtime, "fp32"], plain_version, latencies, memory


def _safest(seconds: dict[str, float]) -> str | None:
    """Of low-bit formats the one that stands in for a candidate: most bits, then the fastest."""
    return min(seconds, key=lambda name: (-FORMATS[name].bits, seconds[name]), default=None)


def _remains(model: Model, data: Samples, seconds: float) -> float:
    """Share of a cut's drop that distillation will leave, from how many steps there is time for.

    A guess that the candidates correct: a quarter after thirty steps, all of it after none.
    """
    if not seconds:
        return 1.0
    predict = torch_predictor(model, fast=True)
    # Forward and backward of the student, half of the original; forward of the original.
    steps = seconds / (2.5 * timed(lambda: predict(data.everything[0])))
    return 1 - 0.75 * min(1.0, steps / 30)


def _surveyed(found: Survey, seconds: float) -> str:
    if not found.fresh:
        return f"survey: kept from an earlier fit ({found.evaluations} networks then)"
    text = f"survey: {found.fresh} networks evaluated in {seconds:.0f} s"
    if found.fresh < found.evaluations:
        text += f", {found.evaluations - found.fresh} known from an earlier fit"
    return text + ("" if found.complete else "; stopped by --within, what is left counts as worst")


def _slope(found: Survey) -> float:
    """Drop of the metric per unit of error, least squares over the ladder."""
    pairs = [(d.error, max(0.0, d.drop)) for d in found.ladder]
    weight = sum(e * e for e, _ in pairs)
    return max(0.05, sum(e * d for e, d in pairs) / weight) if weight else 1.0


def knee(front: Sequence[Made]) -> Made:
    """Of measured points the one furthest under the line from the original to the smallest.

    Satopaa et al., "Finding a Kneedle in a Haystack" (2011), section 3: drop against size and
    latency as fractions of the original's, each axis from 0 to 1.
    """
    gains = [_gain(made) / 2 for made in front]
    drops = [max(0.0, made.trial.drop.value) if made.trial.drop else 0.0 for made in front]
    least, most = min(gains), max(max(drops), 1e-9)

    def under(index: int) -> float:
        saved = (1 - gains[index]) / max(1 - least, 1e-9)
        return saved - drops[index] / most

    return front[max(range(len(front)), key=lambda i: (under(i), -gains[i]))]


def _gain(made: Made) -> float:
    """Size and latency as fractions of the original's, added: less is better."""
    was, now = made.trial.baseline, made.trial.measured
    return now.size_bytes / was.size_bytes + 1 / max(made.trial.ratio, 1e-9)


def _rank(made: Made, budget: Budget) -> tuple[float, float, float]:
    """Least over the budget first; then smallest and fastest, or best where no drop is asked."""
    over = budget.excess(made.trial.measured, made.trial.drop)
    lost = made.trial.drop.value if made.trial.drop and budget.max_drop is None else 0.0
    return max((ratio for ratio, _ in over.values()), default=0.0), lost, _gain(made)
