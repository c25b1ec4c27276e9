"""Search: make candidates, most promising first, measure each, and learn from it for the next.

A candidate that is clearly too bad on calibration data is given up before it is exported.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

from penjing.apply import Done, apply
from penjing.errors import BudgetError, PenjingError
from penjing.evaluate import torch_predictor
from penjing.fit.bench import Bench
from penjing.fit.budget import Budget
from penjing.fit.choose import candidates
from penjing.fit.outcome import Made
from penjing.fit.predict import Prediction, Predictor
from penjing.fit.samples import Samples
from penjing.fit.space import FORMATS, Choice, formats_for, recipe_of
from penjing.model import Model
from penjing.progress import task as progress
from penjing.recipe import Recipe
from penjing.result import Drop, show_drop
from penjing.workers import Where

__all__ = ["Settings", "Work", "failing", "search"]

# Without any limit candidates are made for these drops, one after the other.
_DROPS = (0.02, 0.005, 0.05, 0.1)
# Candidates that came to nothing (no export, given up early) beyond `tries`.
_LOST = 3


@dataclass(frozen=True)
class Settings:
    """How a fit works, besides the budget.

    Attributes:
        runtime: name, or None to choose by measurement.
        batch, length: of the latency that counts.
        threads: None for the physical cores.
        confidence: of the drop's interval.
        seed: of splits and bootstrap.
        tries: candidates measured at the most.
        recover: seconds of distillation of a candidate, 0 for none.
        patience: seconds after which a found artifact is good enough, where no time was given.
        command: as typed, for the report.
        where: units are surveyed.
        device: a profile, or ssh://user@host: whose latency counts. None for this machine.
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
    where: Where = field(default_factory=Where)
    device: str | None = None


@dataclass
class Work:
    """What making and measuring a candidate needs.

    Attributes:
        drops: drop of the metric of an edited network, on calibration data.
        start: of the fit, on the monotonic clock.
        usual: seconds that a candidate is expected to take, before one was made.
        reserve: seconds to be kept until a candidate meets the budget, for what stands in for it.
    """

    model: Model
    data: Samples
    bench: Bench
    predictor: Predictor
    budget: Budget
    settings: Settings
    runtime: str
    drops: Callable[[Model], Drop]
    start: float
    usual: float
    reserve: float = 0.0


def search(work: Work, known: Sequence[Choice]) -> list[Made]:
    """Make and measure candidates until one meets the budget and nothing better is in sight.

    Without any limit they are spread over several drops, for the front.

    `known` are exported already: with one of them a candidate that cannot end within the
    budget's time is not begun.
    """
    predictor, budget, settings, notes = (
        work.predictor, work.budget, work.settings, work.bench.notes,
    )  # fmt: skip
    made: list[Made] = []
    seen = set(known)
    good: list[Choice] = []
    ceiling = float("inf")
    slowest = work.usual
    within = budget.within or float("inf")
    patience = budget.within or settings.patience
    formats = formats_for(work.model)
    for number in range(settings.tries + _LOST):
        spent = time.monotonic() - work.start
        if len(made) == settings.tries:
            break
        # The first is worth the risk: what stands in for it is seldom what was hoped for.
        reserve = 0.0 if good or not number else work.reserve
        if (made or known) and spent + slowest + reserve > within:
            notes.append(
                f"no further candidate: {spent:.0f} s have gone, --within is {within:.0f} s"
                + ("" if spent > within else f", and one would take about {slowest:.0f} s")
            )
            break
        # Without a bar for quality the first that fits is the one with the least error.
        if good and (
            spent + slowest > patience or (budget.max_drop is None and not budget.is_open)
        ):
            break
        began = time.monotonic()
        left = [
            (c, p)
            for c, p in candidates(predictor, _aimed(budget, predictor, number), formats)
            if c not in seen and p.error < 0.9 * ceiling
        ]
        if not left:
            break
        choice, said = left[0]
        best = min((predictor(c).gain(predictor.plain) for c in good), default=float("inf"))
        best = float("inf") if budget.is_open else best
        if said.gain(predictor.plain) > 0.95 * best:
            break
        seen.add(choice)
        one = None
        with failing(notes, f"candidate {number + 1} ({choice.describe()})"):
            one = _make(work, choice, said, number)
        taken = time.monotonic() - began
        slowest = max(slowest if made else 0.0, taken)
        if one is None:
            # Too much error for the metric or for the export: the next is a safer one.
            ceiling = min(ceiling, said.error)
            predictor.remains = min(1.0, 2 * predictor.remains)
            continue
        notes.append(f"candidate {number + 1} ({choice.describe()}): {taken:.0f} s")
        made.append(one)
        measured = one.trial.measured
        over = budget.excess(measured, one.trial.drop)
        good += [] if over else [choice]
        was = one.trial.baseline.latency_ms.median / 1e3
        predictor.correct(
            choice, measured.size_bytes, was / one.trial.ratio, measured.peak_memory_bytes
        )
        if one.trial.drop is not None:
            ratio = one.trial.drop.value / max(said.drop, 1e-4)
            predictor.slope *= min(4.0, max(1.5, ratio)) if "drop" in over else 0.7
            if "drop" not in over:  # distillation did as hoped: a deeper one is worth a try
                predictor.remains *= 0.7
        if "drop" in over:
            ceiling = min(ceiling, said.error)  # only less error can help
    return made


def _aimed(budget: Budget, predictor: Predictor, number: int) -> Budget:
    """What the candidate of this number is to meet.

    A limit of memory is one of size: a runtime's memory grows with the file.
    """
    if budget.is_open:
        return replace(budget, max_drop=_DROPS[number % len(_DROPS)])
    if budget.max_memory is None:
        return budget
    size = max(1, round(predictor.size_within(budget.max_memory)))
    return replace(budget, max_size=min(budget.max_size or size, size))


def _make(work: Work, choice: Choice, said: Prediction, number: int) -> Made | None:
    model, data, settings = work.model, work.data, work.settings
    few = any(FORMATS[f].bits < 8 for f in (*choice.formats, choice.rest))
    # Eight bits of an encoder are as good rounded to nearest; of a convolutional network not at
    # all: EfficientNet-Lite0 kept 52 % of its top-1, with error feedback 91 %.
    method = "gptq" if few or model.is_image else "rtn"
    structural, numbers = recipe_of(
        model, choice, method=method, recover=settings.recover, seed=settings.seed
    )
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
            _hopeless(work, edited)
        last = apply(edited, numbers, data.edits)
        exported = work.bench.export(last.model, f"candidate-{number}", work.runtime)
        if exported is None:
            return None
        trial = work.bench.trial(exported, torch_predictor(model))
    recipe = Recipe(structural.steps + numbers.steps, settings.seed)
    return Made(choice, said, trial, recipe, done + last.done)


def _hopeless(work: Work, edited: Model) -> None:
    """Give up a candidate whose drop on calibration data is above the bar beyond doubt.

    Raises:
        BudgetError: it is.
    """
    bar = work.budget.max_drop
    if bar is None:
        return
    found, metric = work.drops(edited), work.bench.task.metric
    if found.samples and found.low > bar:
        low, value, asked = (
            show_drop(x, metric, found.relative) for x in (found.low, found.value, bar)
        )
        raise BudgetError(
            "given up before export",
            got=f"a drop of {value}, at least {low}, on calibration data",
            allowed=asked,
        )


@contextmanager
def failing(notes: list[str], what: str) -> Iterator[None]:
    """One candidate that fails is a note of the report, not the end of a fit."""
    try:
        yield
    except PenjingError as error:
        notes.append(f"{what} failed: {error}")
