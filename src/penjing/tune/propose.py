"""What is tried next: Optuna proposes.

Proposals come from a tree-structured Parzen estimator (Bergstra et al., NeurIPS 2011), by a random
state of (seed, trial number). Of `concurrency` trials that may be made at once, number n is
proposed with the parameters of all trials before it and the outcomes of those up to
n - concurrency. What the others come to is not looked at, whoever is done first; the estimator
keeps away from them as from bad ones (constant liar: Ginsbourger et al., 2010). So a search
proposes the same with any number of workers, and one that goes on from its records what an
undisturbed one would.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from penjing.errors import UsageError
from penjing.tune.records import Record
from penjing.tune.space import Axis, Space

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution
    from optuna.trial import FrozenTrial

__all__ = ["Proposal", "Proposals", "check_optuna", "frozen"]

# Points of a space that are listed to find one that was not tried.
_LISTED = 100_000


@dataclass(frozen=True)
class Proposal:
    """A trial to be made.

    Attributes:
        number: of the trial.
        params: by name.
        same: number of an earlier trial with the same parameters: it is not made again.
    """

    number: int
    params: dict[str, float | str]
    same: int | None = None


class Proposals:
    """Proposals in the order of their numbers.

    Args:
        seed: of the random states.
        objectives: numbers that an outcome has.
        concurrency: see above.
    """

    def __init__(self, space: Space, seed: int, objectives: int, concurrency: int) -> None:
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._space, self._seed, self._concurrency = space, seed, concurrency
        self._study = optuna.create_study(directions=["minimize"] * objectives)
        self._trials: list[Any] = []
        self._told = 0
        self._last: Proposal | None = None
        self._first: dict[tuple[tuple[str, float | str], ...], int] = {}

    @property
    def number(self) -> int:
        """Of the next one."""
        return len(self._trials)

    @property
    def different(self) -> int:
        """How many proposals were not known before."""
        return len(self._first)

    def may(self, records: Mapping[int, Record]) -> bool:
        """Whether all is known that the next one depends on."""
        return all(n in records for n in range(self._told, self._before))

    @property
    def _before(self) -> int:
        """Number of trials, the first ones, whose outcomes the next proposal depends on."""
        return max(0, self.number - self._concurrency + 1)

    def bar(self, records: Mapping[int, Record]) -> float:
        """Least upper end of a drop on the first samples, of trials within the limits that the
        next one may know of; infinite where there are none."""
        known = (records[n].outcome for n in range(self._before))
        return min((o.figures.get("first_high", math.inf) for o in known if o.within),
                   default=math.inf)  # fmt: skip

    def next(self, records: Mapping[int, Record]) -> Proposal:
        """The next one; what it is where the trial was finished in an earlier run.

        Args:
            records: finished trials by number; `may` is true of them.
        """
        while self._told < self._before:
            _tell(self._study, self._trials[self._told], records[self._told])
            self._told += 1
        number = self.number
        fixed = records[number].params if number in records else self._fixed()
        if fixed is None:
            self._study.sampler = _sampler(self._seed, number)
        else:
            from optuna.samplers import RandomSampler

            self._study.sampler = RandomSampler(seed=0)  # it has nothing to say
            self._study.enqueue_trial(_inner(self._space, fixed))
        trial = self._study.ask({axis.name: _distribution(axis) for axis in self._space.axes})
        self._trials.append(trial)
        params = _outer(self._space, trial.params)
        same = self._first.setdefault(_key(params), number)
        self._last = Proposal(number, params, None if same == number else same)
        return self._last

    def _fixed(self) -> dict[str, float | str] | None:
        """Parameters that are not asked for: the recipe's own first, and in a space that can be
        listed, after a proposal that was known, one of those that were not tried."""
        if self._last is None:
            return self._space.default
        if self._last.same is None or (self._space.count or math.inf) > _LISTED:
            return None
        left = [point for point in self._space.points() if _key(point) not in self._first]
        return left[int(_random(self._seed, self.number).integers(len(left)))]


def _key(params: Mapping[str, float | str]) -> tuple[tuple[str, float | str], ...]:
    return tuple(sorted(params.items()))


def check_optuna() -> None:
    """Refuse to begin without Optuna.

    Raises:
        UsageError: it is not installed.
    """
    if importlib.util.find_spec("optuna") is None:
        raise UsageError("tune needs Optuna", next="pip install 'penjing[tune]'")


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


def _tell(study: Any, trial: Any, record: Record) -> None:
    """The same to a trial that was asked for."""
    from optuna.trial import TrialState

    outcome = record.outcome
    for name, value in outcome.limits.items():
        trial.set_constraint(name, value)
    if outcome.state == "complete":
        study.tell(trial, list(outcome.values))
        return
    if outcome.early is not None and len(study.directions) == 1:
        trial.report(outcome.early, 0)
    study.tell(trial, state=TrialState.PRUNED)
