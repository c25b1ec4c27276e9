"""Solve: one option for every unit, exactly, as an integer program.

    minimise    sum over units u, options o of cost[u, o] x[u, o]
    subject to  sum over o of x[u, o] = 1 for every u,   x in {0, 1}
                sum of amount[c, u, o] x[u, o] <= limit[c] for every constraint c

A multiple-choice knapsack, given to HiGHS through scipy.optimize.milp.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array

__all__ = ["Constraint", "solve"]

Values = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True)
class Constraint:
    """Sum of chosen amounts <= limit; amounts by unit and option."""

    amounts: Sequence[Sequence[float]]
    limit: float


def solve(
    costs: Sequence[Sequence[float]], constraints: Mapping[str, Constraint],
    without: Collection[Sequence[int]] = (),
) -> tuple[int, ...] | None:  # fmt: skip
    """The cheapest choice of one option a unit.

    Args:
        costs: by unit, by option; an infinite one is not allowed.
        constraints: by name; `amounts` shaped like `costs`, an infinite one is not allowed.
        without: choices that are out.

    Returns:
        Option numbers by unit, or None where no choice satisfies the constraints.
    """
    if not len(costs):
        return None if without else ()
    price = _flat(costs)
    sizes = [len(options) for options in costs]
    starts = np.concatenate([[0], np.cumsum(sizes)]).astype(int)
    amounts = [(_flat(c.amounts), c.limit) for c in constraints.values()]
    allowed = np.isfinite(price)
    for row, limit in amounts:
        least = _least(row, starts)
        if not least <= limit + _slack(limit):
            return None
        # An option that leaves too little for the others goes before the solver sees it: its
        # amount would set the scale, and small amounts would drown in the solver's tolerance.
        for a, b in itertools.pairwise(starts):
            allowed[a:b] &= row[a:b] - row[a:b].min() <= limit - least + _slack(limit)
    if not all(allowed[a:b].any() for a, b in itertools.pairwise(starts)):
        return None
    ones = csr_array(
        (np.ones(len(price)), (np.repeat(np.arange(len(sizes)), sizes), np.arange(len(price)))),
        shape=(len(sizes), len(price)),
    )
    rules = [LinearConstraint(ones, 1, 1)]
    for row, limit in amounts:
        # By unit only what is above its cheapest option counts, against what is left of the limit.
        above, left = _above(row, starts, allowed), limit - _least(row, starts)
        scale = max(above.max(), 1e-300)
        rules.append(LinearConstraint(above[None] / scale, -np.inf, left / scale))
    rules += [_not(starts[:-1] + list(choice), len(price)) for choice in without]
    goal = _above(price, starts, allowed)
    while True:
        found = milp(
            goal / max(goal.max(), 1e-300),
            constraints=rules,
            integrality=np.ones(len(price)),
            bounds=Bounds(0, allowed.astype(float)),
            options={"mip_rel_gap": 0.0},
        )
        if found.x is None:
            return None
        chosen = [int(np.argmax(found.x[a:b])) for a, b in itertools.pairwise(starts)]
        places = starts[:-1] + chosen
        if all(math.fsum(row[places]) <= limit + _slack(limit) for row, limit in amounts):
            return tuple(chosen)
        # Over by less than the solver's tolerance: this very choice is out, on to the next.
        rules.append(_not(places, len(price)))


def _not(places: Values, count: int) -> LinearConstraint:
    """Not all of these options together."""
    picked = np.zeros(count)
    picked[places] = 1
    return LinearConstraint(picked[None], -np.inf, len(places) - 1)


def _flat(values: Sequence[Sequence[float]]) -> Values:
    return np.concatenate([np.asarray(own, dtype=float) for own in values])


def _slack(limit: float) -> float:
    """Rounding of a sum that meets the limit exactly."""
    return 1e-12 * abs(limit)


def _least(row: Values, starts: Values) -> float:
    return math.fsum(row[a:b].min() for a, b in itertools.pairwise(starts))


def _above(row: Values, starts: Values, allowed: Values) -> Values:
    """Each amount less the least of its unit, 0 where the option is not allowed."""
    least = np.repeat([row[a:b].min() for a, b in itertools.pairwise(starts)], np.diff(starts))
    return np.where(allowed, row - least, 0.0)
