"""Costs corrected by sums: against conditioning a normal distribution with its whole covariance."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from penjing.fit import belief
from penjing.fit.belief import Belief

KINDS = (2, 2, 4)


def prior_of(seed: int, units: int = 4) -> np.ndarray:
    return np.random.default_rng(seed).uniform(0.2, 3.0, (units, len(KINDS)))


def conditioned(
    prior: np.ndarray, seen: list[tuple[int, ...]], totals: list[float], noises: list[float]
) -> tuple[np.ndarray, np.ndarray]:
    """Mean and covariance of all costs given the totals, from those of every pair of costs."""
    places = list(itertools.product(range(len(prior)), range(len(KINDS))))
    covariance = np.array([
        [prior[u, o] * prior[v, p] * (
            belief._ALL**2 + (u == v) * belief._UNIT**2 + (KINDS[o] == KINDS[p]) * belief._KIND**2
            + ((u, o) == (v, p)) * belief._ONE**2
        ) for v, p in places]
        for u, o in places
    ])  # fmt: skip
    rows = np.array([[float(choice[u] == o) for u, o in places] for choice in seen])
    y, flat = np.array(totals), prior.ravel()
    noise = np.diag(np.array(noises) ** 2 + (belief._TOTAL * y) ** 2)
    gain = covariance @ rows.T @ np.linalg.inv(rows @ covariance @ rows.T + noise)
    mean = (flat + gain @ (y - rows @ flat)).reshape(prior.shape)
    return mean, covariance - gain @ rows @ covariance


@pytest.mark.parametrize("seed", range(5))
def test_costs_are_the_conditional_mean(seed: int) -> None:
    random, prior = np.random.default_rng(seed + 100), prior_of(seed)
    own = Belief(prior.tolist(), KINDS)
    seen, totals, noises = [], [], []
    for _ in range(4):
        choice = tuple(int(o) for o in random.integers(0, 3, len(prior)))
        if choice in seen:
            continue
        total = float(sum(prior[u, o] for u, o in enumerate(choice)) * random.uniform(0.8, 1.2))
        noise = float(random.uniform(0, 0.1))
        own.learn(choice, total, noise)
        seen, totals, noises = [*seen, choice], [*totals, total], [*noises, noise]
    wanted, covariance = conditioned(prior, seen, totals, noises)
    assert (wanted > belief._LEAST * prior).all()  # the bound does not hide anything
    np.testing.assert_allclose(own.costs, wanted, rtol=1e-6)
    other = (2, 1, 0, 2)
    apart = np.zeros_like(prior)
    apart[np.arange(4), seen[0]] += 1
    apart[np.arange(4), other] -= 1
    deviation = (apart.ravel() @ covariance @ apart.ravel()) ** 0.5
    assert own.doubt(seen[0], other) == pytest.approx(deviation, rel=1e-5)
    assert own.doubt(other, other) == 0
    assert own.said(seen[0]) == pytest.approx(sum(wanted[u, o] for u, o in enumerate(seen[0])))


def test_runs_that_say_nothing_change_nothing() -> None:
    prior = prior_of(0)
    own = Belief(prior.tolist(), KINDS)
    own.learn((0, 0, 0, 0), float("inf"))
    np.testing.assert_array_equal(own.costs, prior)
    own.learn((0, 0, 0, 0), 100.0, noise=1e6)
    np.testing.assert_allclose(own.costs, prior, rtol=1e-6)


def test_costs_stay_above_zero() -> None:
    prior = prior_of(1)
    own = Belief(prior.tolist(), KINDS)
    own.learn((0, 1, 2, 0), 1e-9)
    assert (own.costs >= belief._LEAST * prior - 1e-12).all()
