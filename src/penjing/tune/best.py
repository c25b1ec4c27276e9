"""What a search came to: the front, the trial to keep, and what mattered."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from penjing.tune.propose import frozen
from penjing.tune.records import Record
from penjing.tune.space import Space

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial

__all__ = ["best_of", "front", "importances"]

# Complete trials from which importances are computed: the estimator looks at the best tenth.
_ENOUGH = 20


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
    import optuna
    from optuna.importance import get_param_importances

    study = optuna.create_study(directions=["minimize"] * len(names))
    for record in records:
        study.add_trial(frozen(space, record, len(names)))
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
