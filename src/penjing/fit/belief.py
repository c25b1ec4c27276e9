"""Belief: costs of options that add up only nearly, corrected by the whole choices that were run.

    total(choice) = sum over units of cost[unit, option] + noise, the noise as large as it is said
    cost[u, o] = prior[u, o] (1 + e + e[u] + e[kind of o] + e[u, o]),   every e normal around 0

so that what one whole choice took says something of each of its parts, of other options of the same
units and of the same kind of option elsewhere. After every run the costs are their conditional
mean, in the form of a regression by kernel (Rasmussen and Williams, "Gaussian Processes for
Machine Learning", 2006, equation 2.25), and the integer program is solved anew: the linear case
of Baptista and Poloczek, arXiv 1806.08838, section 3, from a prior that was measured.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np

__all__ = ["Belief"]

Values = np.ndarray[Any, np.dtype[Any]]

# Deviations of the four factors, and of a total from its sum, as parts of what they are of.
_ALL, _UNIT, _KIND, _ONE = 0.3, 0.3, 0.3, 0.15
_TOTAL = 0.02
# Costs stay above this part of their prior: an option that costs nothing would be taken anywhere.
_LEAST = 0.1


class Belief:
    """What is believed of costs.

    Args:
        prior: by unit, by option, finite and not negative; every unit has the same options.
        kinds: of the options; those of one kind err together.
    """

    def __init__(self, prior: Sequence[Sequence[float]], kinds: Sequence[Hashable]) -> None:
        self._prior: Values = np.asarray(prior, dtype=float)  # [units, options]
        names = list(dict.fromkeys(kinds))
        self._kinds: Values = np.asarray([names.index(k) for k in kinds])
        self._seen: list[tuple[int, ...]] = []
        self._totals: list[float] = []
        self._noises: list[float] = []
        self._kernel: Values = np.zeros((0, 0))
        self.costs: Values = self._prior
        """[units, options]"""

    def said(self, choice: Sequence[int]) -> float:
        """The total that is expected of a choice."""
        return float(self._of(self.costs, choice).sum())

    def learn(self, choice: Sequence[int], total: float, noise: float = 0.0) -> None:
        """A choice was run and took `total`; one that is not finite says nothing.

        Args:
            noise: standard deviation of the total.
        """
        if not np.isfinite(total):
            return
        self._seen.append(tuple(choice))
        self._totals.append(total)
        self._noises.append(noise**2 + (_TOTAL * total) ** 2 + 1e-300)
        shared = np.stack([self._shared(c) for c in self._seen])  # [runs, units, options]
        kernel = np.stack([[self._of(s, c).sum() for c in self._seen] for s in shared])
        self._kernel = kernel + np.diag(self._noises)  # [runs, runs]
        off = np.stack([t - self._of(self._prior, c).sum()
                        for t, c in zip(self._totals, self._seen, strict=True)])  # fmt: skip
        # Least squares: where nothing costs anything the kernel is singular.
        weights = np.linalg.lstsq(self._kernel, off, rcond=None)[0]  # [runs]
        costs = self._prior + np.tensordot(weights, shared, 1)
        self.costs = np.maximum(costs, _LEAST * self._prior)

    def doubt(self, one: Sequence[int], other: Sequence[int]) -> float:
        """Standard deviation of the difference between the totals of two choices."""
        mine, its = self._shared(one), self._shared(other)
        off = mine - its
        before = self._of(off, one).sum() - self._of(off, other).sum()
        with_seen = np.array([self._of(off, c).sum() for c in self._seen])
        known = with_seen @ np.linalg.pinv(self._kernel) @ with_seen if self._seen else 0.0
        return math.sqrt(max(0.0, float(before - known)))

    def _of(self, values: Values, choice: Sequence[int]) -> Values:
        return values[np.arange(len(values)), list(choice)]

    def _shared(self, choice: Sequence[int]) -> Values:
        """Covariance of every cost with the total of a choice, [units, options]."""
        own = self._of(self._prior, choice)  # [units]
        kinds = np.bincount(self._kinds[list(choice)], own, self._kinds.max() + 1)
        chosen = np.zeros_like(self._prior)
        chosen[np.arange(len(own)), list(choice)] = own
        factors = _ALL**2 * own.sum() + _UNIT**2 * own[:, None]
        factors = factors + _KIND**2 * kinds[self._kinds][None] + _ONE**2 * chosen
        return self._prior * factors  # type: ignore[no-any-return]
