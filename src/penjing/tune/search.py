"""The search: Optuna proposes, one trial is made after the other, each is kept when it is finished.

Proposals come from a tree-structured Parzen estimator (Bergstra et al., NeurIPS 2011), with the
objectives and constraints of all finished trials, by a random state of (seed, trial number) alone.
So a search that goes on from its records proposes what an undisturbed one would.
"""

from __future__ import annotations

import importlib.util
import math
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from penjing.errors import PenjingError, UsageError
from penjing.progress import track
from penjing.recipe import Recipe
from penjing.tune.records import Outcome, Record, Store
from penjing.tune.space import Axis, Space

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution
    from optuna.study import Study
    from optuna.trial import FrozenTrial

__all__ = ["Evaluate", "best_of", "check_optuna", "front", "frozen", "importances", "search"]

Evaluate = Callable[[Recipe, Sequence[Record]], Outcome]

# Complete trials from which importances are computed: the estimator looks at the best tenth.
_ENOUGH = 20
# Points of a space that are listed to find one that was not tried.
_LISTED = 100_000


def check_optuna() -> None:
    """Refuse to begin without Optuna.

    Raises:
        UsageError: it is not installed.
    """
    if importlib.util.find_spec("optuna") is None:
        raise UsageError("tune needs Optuna", next="pip install 'penjing[tune]'")


def search(
    space: Space,
    evaluate: Evaluate,
    store: Store,
    *,
    objectives: int = 1,
    trials: int = 40,
    seed: int = 0,
    within: float = math.inf,
    after: float = 0.0,
) -> list[Record]:
    """Make trials until there are `trials` in the store, the time is over or the space empty.

    Args:
        space: where to look. The recipe as it is comes first, where it is in the space.
        evaluate: the outcome of a recipe, given all trials before it. A PenjingError or too
            little memory is an outcome too.
        store: finished trials; those that are there count.
        objectives: numbers that an outcome has.
        trials: at the most; what was tried before is not made again and does not count.
        seed: of the proposals.
        within: seconds from now. A trial that is not expected to end by then is not begun.
        after: what follows and must end by then too, in trials.

    Returns:
        All records of the store.
    """
    began = time.monotonic()
    study = _study(space, store.records, objectives)
    done = {_key(r): r for r in store.records if r.same is None}
    total = min(trials, space.count or trials)
    for _ in track(range(max(0, total - len(done))), "trials", total=max(0, total - len(done))):
        while True:
            slowest = max((r.seconds for r in store.records), default=0.0)
            if time.monotonic() - began + (1 + after) * slowest > within:
                return store.records
            number, start = len(store.records), time.monotonic()
            if (fixed := _fixed(space, store.records, seed)) is not None:
                study.enqueue_trial(_inner(space, fixed))
            study.sampler = _sampler(seed, number)
            trial = study.ask({axis.name: _distribution(axis) for axis in space.axes})
            params = _outer(space, trial.params)
            if (known := done.get(_key(params))) is not None:
                record = Record(number, params, known.outcome, 0.0, known.number)
            else:
                outcome = _outcome(space, params, evaluate, store.records)
                record = Record(number, params, outcome, time.monotonic() - start)
            store.append(record)
            _tell(study, trial, record, objectives)
            if record.same is None:
                done[_key(params)] = record
                break
    return store.records


def _outcome(
    space: Space, params: dict[str, float | str], evaluate: Evaluate, records: Sequence[Record]
) -> Outcome:
    try:
        found = evaluate(space.recipe_of(params), tuple(records))
    except PenjingError as error:
        return Outcome("refused", limits={"refused": 1.0}, why=str(error))
    except MemoryError:
        return Outcome("refused", limits={"refused": 1.0}, why="out of memory")
    numbers = (*found.values, *found.limits.values())
    if not all(math.isfinite(v) for v in numbers):
        return Outcome("refused", limits={"refused": 1.0}, why="a figure is not finite")
    return found


def _fixed(space: Space, records: Sequence[Record], seed: int) -> dict[str, float | str] | None:
    """Parameters that are not asked for: the recipe's own first, and in a space that can be
    listed, after a proposal that was known, one of those that were not tried."""
    if not records:
        return space.default
    if records[-1].same is None or (space.count or math.inf) > _LISTED:
        return None
    tried = {_key(r) for r in records}
    left = [point for point in space.points() if _key(point) not in tried]
    return left[int(_random(seed, len(records)).integers(len(left)))]


def _key(found: Record | dict[str, float | str]) -> tuple[tuple[str, float | str], ...]:
    return tuple(sorted((found.params if isinstance(found, Record) else found).items()))


def _random(seed: int, number: int) -> np.random.Generator:
    return np.random.default_rng([seed % 2**32, number])


def _sampler(seed: int, number: int) -> Any:
    from optuna.samplers import TPESampler

    return TPESampler(seed=int(_random(seed, number).integers(2**32)))


def _distribution(axis: Axis, plain: bool = False) -> BaseDistribution:
    """Of a parameter; fractions with a step by their place on the grid, unless `plain`.

    Optuna adds such steps up in floats: 0.8999999999999999 would be a point beside 0.9.
    """
    from optuna.distributions import (
        CategoricalDistribution,
        FloatDistribution,
        IntDistribution,
    )

    if axis.choices:
        return CategoricalDistribution([text for text, _ in axis.choices])
    if axis.whole:
        return IntDistribution(
            int(axis.low), int(axis.high), log=axis.log, step=int(axis.spacing or 1)
        )
    if (grid := axis.parameters) is not None and not plain:
        return IntDistribution(0, len(grid) - 1)
    return FloatDistribution(axis.low, axis.high, log=axis.log, step=axis.spacing)


def _inner(space: Space, params: Mapping[str, float | str]) -> dict[str, Any]:
    """Parameters as Optuna is asked for them."""
    return {
        axis.name: params[axis.name] if (grid := _grid(axis)) is None
        else grid.index(params[axis.name])
        for axis in space.axes
    }  # fmt: skip


def _outer(space: Space, inner: Mapping[str, Any]) -> dict[str, float | str]:
    """Inverse of `_inner`."""
    return {
        axis.name: inner[axis.name] if (grid := _grid(axis)) is None else grid[inner[axis.name]]
        for axis in space.axes
    }


def _grid(axis: Axis) -> list[float | str] | None:
    """Of fractions with a step."""
    return None if axis.choices or axis.whole else axis.parameters


def _study(space: Space, records: Sequence[Record], objectives: int) -> Study:
    """A study in memory that knows the records."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(directions=["minimize"] * objectives)
    for record in records:
        study.add_trial(frozen(space, record, objectives))
    return study


def frozen(
    space: Space, record: Record, objectives: int, shown: dict[str, Any] | None = None
) -> FrozenTrial:
    """A record as Optuna keeps it; `shown` to people, with these attributes beside it."""
    from optuna.trial import TrialState, create_trial

    outcome = record.outcome
    complete = outcome.state == "complete"
    early = {} if complete or outcome.early is None or objectives > 1 else {0: outcome.early}
    return create_trial(
        state=TrialState.COMPLETE if complete else TrialState.PRUNED,
        values=outcome.values if complete else None,
        params=_inner(space, record.params) if shown is None else dict(record.params),
        distributions={a.name: _distribution(a, shown is not None) for a in space.axes},
        constraints=dict(outcome.limits),
        intermediate_values=early,
        user_attrs=shown or {},
    )


def _tell(study: Study, trial: Any, record: Record, objectives: int) -> None:
    """The same to a trial that was asked for."""
    from optuna.trial import TrialState

    outcome = record.outcome
    for name, value in outcome.limits.items():
        trial.set_constraint(name, value)
    if outcome.state == "complete":
        study.tell(trial, list(outcome.values))
        return
    if outcome.early is not None and objectives == 1:
        trial.report(outcome.early, 0)
    study.tell(trial, state=TrialState.PRUNED)


def front(records: Sequence[Record]) -> list[Record]:
    """Trials within all limits that no other such trial beats, in the order they were made.

    Of trials with the same objectives the one with the least drop, and of those the first.
    """
    own = [r for r in records if r.same is None and r.outcome.within]

    def beats(a: Record, b: Record) -> bool:
        pairs = zip(a.outcome.values, b.outcome.values, strict=True)
        if a.outcome.values == b.outcome.values:
            return (a.outcome.figures.get("drop", 0.0), a.number) < (
                b.outcome.figures.get("drop", 0.0), b.number,
            )  # fmt: skip
        return all(x <= y for x, y in pairs)

    return [r for r in own if not any(beats(other, r) for other in own)]


def best_of(records: Sequence[Record]) -> Record | None:
    """The trial to keep.

    Of the front the one whose worst objective is best, each scaled to 0 at its best and 1 at its
    worst on the front. Where no trial is within the limits, the one that is nearest to them.
    None where no trial came to any figures.
    """
    points = front(records)
    if not points:
        reached = [r for r in records if r.same is None and r.outcome.state != "refused"]
        return min(reached, key=_over, default=None)
    table = np.array([r.outcome.values for r in points])  # [points, objectives]
    low, high = table.min(0), table.max(0)
    scaled = (table - low) / np.where(high > low, high - low, 1.0)
    order = sorted(range(len(points)), key=lambda i: (scaled[i].max(), scaled[i].sum(), i))
    return points[order[0]]


def _over(record: Record) -> tuple[float, bool, int]:
    over = sum(max(0.0, v) for v in record.outcome.limits.values())
    return over, record.outcome.state != "complete", record.number


def importances(
    space: Space, records: Sequence[Record], names: Sequence[str]
) -> tuple[dict[str, dict[str, float]], str]:
    """How much each parameter matters to be among the best tenth, by objective; they add up to 1.

    By Optuna's evaluator (PED-ANOVA, Watanabe et al., IJCAI 2023), over all complete trials.

    Args:
        names: of the objectives.

    Returns:
        Shares by objective and parameter, and why an objective has none, empty where all have.
    """
    complete = [r for r in records if r.outcome.state == "complete"]
    if len(complete) < _ENOUGH:
        return {}, f"importances need {_ENOUGH} complete trials, there are {len(complete)}"
    from optuna.importance import get_param_importances

    study = _study(space, records, len(names))
    found: dict[str, dict[str, float]] = {}
    flat = []
    for index, name in enumerate(names):
        if len({r.outcome.values[index] for r in complete}) == 1:
            flat.append(name)
            continue
        with warnings.catch_warnings():
            # That less is better here, which is so.
            warnings.filterwarnings("ignore", message=".*computes the importances")
            shares = get_param_importances(study, target=_objective(index))
        found[name] = {axis.name: float(shares[axis.name]) for axis in space.axes}
    same = f"every trial has the same {', '.join(flat)}: nothing is important to it"
    return found, same if flat else ""


def _objective(index: int) -> Callable[[FrozenTrial], float]:
    return lambda trial: float(trial.values[index])
