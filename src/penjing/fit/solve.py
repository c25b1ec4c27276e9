"""Solve: one option for every unit, exactly, as an integer program.

    minimise    sum over units u, options o of cost[u, o] x[u, o]
    subject to  sum over o of x[u, o] = 1 for every u,   x in {0, 1}
                sum of amount[c, u, o] x[u, o] <= limit[c] for every constraint c

A multiple-choice knapsack, given to HiGHS through scipy.optimize.milp.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array

__all__ = ["Constraint", "solve"]


@dataclass(frozen=True)
class Constraint:
    """Sum of chosen amounts <= limit; amounts by unit and option."""

    amounts: Sequence[Sequence[float]]
    limit: float


def solve(
    costs: Sequence[Sequence[float]], constraints: Mapping[str, Constraint]
) -> tuple[int, ...] | None:
    """The cheapest choice of one option a unit.

    Args:
        costs: by unit, by option.
        constraints: by name; `amounts` shaped like `costs`.

    Returns:
        Option numbers by unit, or None where no choice satisfies the constraints.
    """
    sizes = [len(options) for options in costs]
    starts = np.concatenate([[0], np.cumsum(sizes)])
    total = int(starts[-1])
    if not total:
        return ()
    one = csr_array(
        (np.ones(total), (np.repeat(np.arange(len(sizes)), sizes), np.arange(total))),
        shape=(len(sizes), total),
    )
    rules = [LinearConstraint(one, 1, 1)]
    for constraint in constraints.values():
        row = np.concatenate([np.asarray(a, dtype=float) for a in constraint.amounts])
        # Scaled to the limit: sizes in bytes next to errors would lose the errors.
        scale = max(abs(constraint.limit), float(np.abs(row).max()), 1e-12)
        rules.append(LinearConstraint(row[None] / scale, -np.inf, constraint.limit / scale))
    found = milp(
        np.concatenate([np.asarray(c, dtype=float) for c in costs]),
        constraints=rules,
        integrality=np.ones(total),
        bounds=Bounds(0, 1),
    )
    if found.x is None:
        return None
    return tuple(int(np.argmax(found.x[a:b])) for a, b in itertools.pairwise(starts))
