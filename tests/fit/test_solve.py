"""The integer program against every combination, tried one by one."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from penjing.fit.solve import Constraint, solve


def brute(costs: list[list[float]], constraints: dict[str, Constraint]) -> float | None:
    """The least cost of any allowed combination."""
    best = None
    for pick in itertools.product(*(range(len(own)) for own in costs)):
        if all(
            sum(a[o] for a, o in zip(c.amounts, pick, strict=True)) <= c.limit
            for c in constraints.values()
        ):
            cost = sum(own[o] for own, o in zip(costs, pick, strict=True))
            best = cost if best is None else min(best, cost)
    return best


def spent(amounts: list[list[float]], pick: tuple[int, ...]) -> float:
    return sum(own[o] for own, o in zip(amounts, pick, strict=True))


@pytest.mark.parametrize("seed", range(60))
def test_random_instances_against_brute_force(seed: int) -> None:
    random = np.random.default_rng(seed)
    units = int(random.integers(1, 6))
    sizes = [int(random.integers(1, 5)) for _ in range(units)]

    def table(scale: float) -> list[list[float]]:
        return [(scale * random.random(n)).tolist() for n in sizes]

    # Bytes of megabytes, seconds, and errors of 1e-5, as a fit has them.
    costs = table(1.0)
    tables = {"size": table(1e8), "latency": table(1e-2), "error": table(1e-5)}
    rules = {
        name: Constraint(own, float(random.uniform(0.2, 0.9)) * sum(max(o) for o in own))
        for name, own in tables.items()
    }
    found, best = solve(costs, rules), brute(costs, rules)
    if best is None:
        assert found is None
        return
    assert found is not None
    for name, rule in rules.items():
        assert spent(tables[name], found) <= rule.limit
    assert spent(costs, found) == pytest.approx(best, rel=1e-9)


def test_the_instances_are_of_both_kinds() -> None:
    costs = [[1.0, 2.0], [3.0, 1.0]]
    rule = {"size": Constraint([[5.0, 1.0], [5.0, 9.0]], 6.0)}
    assert solve(costs, rule) == (1, 0)  # the only pair within 6 is 1 + 5
    assert solve(costs, {"size": Constraint([[5.0, 1.0], [5.0, 9.0]], 5.9)}) is None
    assert solve(costs, {}) == (0, 1)


def test_a_small_limit_next_to_a_huge_option_is_kept() -> None:
    """Scaled by the largest amount, 1e-5 would drown in a tolerance of 1e-6."""
    costs = [[0.0, 1.0, 0.0], [0.0, 1.0, 0.0]]
    errors = [[2e-5, 0.0, 50.0], [2e-5, 0.0, 50.0]]
    assert sorted(solve(costs, {"error": Constraint(errors, 2.5e-5)})) == [0, 1]
    assert solve(costs, {"error": Constraint(errors, 1e-5)}) == (1, 1)


def test_small_costs_are_told_apart() -> None:
    """Costs of 1e-8 are below the solver's absolute gap unless they are scaled."""
    assert solve([[3e-8, 1e-8, 2e-8], [1e-8, 2e-8]], {}) == (1, 0)


def test_a_limit_met_exactly_is_met_and_one_byte_less_is_not() -> None:
    sizes = [[25_000_000.0, 24_000_000.0], [3.0, 1.0]]
    costs = [[0.0, 1.0], [0.0, 0.5]]
    assert solve(costs, {"size": Constraint(sizes, 25_000_003)}) == (0, 0)
    # One byte is far within the solver's own tolerance.
    assert solve(costs, {"size": Constraint(sizes, 25_000_002)}) == (0, 1)
    assert solve(costs, {"size": Constraint(sizes, 25_000_000)}) == (1, 0)


def test_over_by_less_than_the_solvers_tolerance_is_over() -> None:
    """Either 50 MB part fits alone; both are one byte of 100 MB over."""
    sizes = [[50_000_001.0, 0.0], [50_000_000.0, 0.0]]
    costs = [[0.0, 1.0], [0.0, 1.5]]
    assert solve(costs, {"size": Constraint(sizes, 100_000_000)}) == (1, 0)
    assert solve(costs, {"size": Constraint(sizes, 100_000_001)}) == (0, 0)


@pytest.mark.parametrize("seed", range(6))
def test_large_instances_against_dynamic_programming(seed: int) -> None:
    """30 units of 8 options with whole sizes: best[s] over all sizes s, unit by unit."""
    random = np.random.default_rng(seed)
    sizes = random.integers(0, 60, (30, 8))
    costs = 1 + (60 - sizes) / 60 + 0.1 * random.random((30, 8))
    limit = 700
    best = np.full(limit + 1, np.inf)
    best[0] = 0.0
    for own, price in zip(sizes, costs, strict=True):
        after = np.full_like(best, np.inf)
        for size, cost in zip(own, price, strict=True):
            after[size:] = np.minimum(after[size:], best[: limit + 1 - size] + cost)
        best = after
    found = solve(costs.tolist(), {"size": Constraint(sizes.tolist(), limit)})
    assert found is not None
    rows = np.arange(30)
    assert sizes[rows, found].sum() <= limit
    assert costs[rows, found].sum() == pytest.approx(best.min(), rel=1e-9)


def test_infinite_costs_and_amounts_are_not_allowed() -> None:
    infinite = float("inf")
    assert solve([[infinite, 5.0]], {}) == (1,)
    assert solve([[infinite, infinite]], {}) is None
    assert solve([[0.0, 1.0]], {"error": Constraint([[infinite, 0.0]], 1.0)}) == (1,)
    assert solve([[0.0, 1.0]], {"error": Constraint([[infinite, infinite]], 1.0)}) is None


def test_a_limit_of_nothing() -> None:
    assert solve([[0.0, 1.0]], {"error": Constraint([[1e-9, 0.0]], 0.0)}) == (1,)
    assert solve([[0.0, 1.0]], {"error": Constraint([[1e-9, 1e-9]], 0.0)}) is None


def test_no_units() -> None:
    assert solve([], {}) == ()


def test_choices_that_are_out() -> None:
    random = np.random.default_rng(3)
    costs = random.random((3, 3)).tolist()
    amounts = random.random((3, 3)).tolist()
    rules = {"size": Constraint(amounts, 1.6)}
    allowed = [
        pick for pick in itertools.product(range(3), repeat=3) if spent(amounts, pick) <= 1.6
    ]
    wanted = sorted(allowed, key=lambda pick: spent(costs, pick))
    assert len(wanted) > 5
    found: list[tuple[int, ...]] = []
    while (pick := solve(costs, rules, found)) is not None:
        found.append(pick)
    assert found == wanted
    assert solve([], {}, [()]) is None
