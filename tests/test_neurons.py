"""Greedy optimal brain surgeon, against all subsets and against numpy's least squares."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
import torch
from torch import Tensor

from penjing.neurons import Reader, by_scores, greedy_obs

DAMPING = 0.01


def _problem(inputs: int, out: int = 5, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(inputs, inputs, generator=generator, dtype=torch.float64)
    x = torch.randn(200, inputs, generator=generator, dtype=torch.float64) @ mix
    return torch.randn(out, inputs, generator=generator), x.T @ x / 200


def _greedy(
    weight: Tensor, gram: Tensor, units: list[list[int]], keep: int, damping: float = DAMPING
) -> tuple[list[int], Tensor]:
    """With one reader; its weight on the inputs that stay."""
    kept, (fitted,) = greedy_obs([Reader(weight, gram, torch.tensor(units))], keep, damping)
    inputs = sorted(i for u in kept for i in units[u])
    gone = [i for i in range(weight.shape[1]) if i not in inputs]
    assert not fitted[:, gone].any()
    return kept, fitted[:, inputs]


def _refit(weight: Tensor, gram: Tensor, inputs: list[int]) -> tuple[np.ndarray, float]:
    """Ridge toward the old weight by numpy's lstsq on stacked equations, and what it costs."""
    h, w = gram.numpy(), weight.double().numpy()
    strength = DAMPING * np.diag(h).mean()
    # Rows A with A^T A = H + strength I: the whole objective is ||A (B - W^T)||^2.
    a = np.linalg.cholesky(h + strength * np.eye(len(h))).T
    solved = np.linalg.lstsq(a[:, inputs], a @ w.T, rcond=None)[0]
    return solved.T, float(np.square(a[:, inputs] @ solved - a @ w.T).sum())


@pytest.mark.parametrize(("size", "keep"), [(1, 7), (1, 5), (2, 3), (2, 2)])
def test_the_refit_is_ridge_least_squares(size: int, keep: int) -> None:
    weight, gram = _problem(8)
    units = [list(range(i, i + size)) for i in range(0, 8, size)]
    kept, fitted = _greedy(weight, gram, units, keep, DAMPING)
    assert len(kept) == keep
    assert kept == sorted(kept)
    inputs = sorted(i for u in kept for i in units[u])
    np.testing.assert_allclose(
        fitted.numpy(), _refit(weight, gram, inputs)[0], rtol=2e-5, atol=2e-5
    )


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("seed", range(6))
def test_one_removal_is_the_best_of_all(size: int, seed: int) -> None:
    weight, gram = _problem(8, seed=seed)
    units = [[i + k * (8 // size) for k in range(size)] for i in range(8 // size)]  # not in a row
    kept, _ = _greedy(weight, gram, units, len(units) - 1, DAMPING)

    def cost(gone: int) -> float:
        inputs = sorted(i for u, unit in enumerate(units) if u != gone for i in unit)
        return _refit(weight, gram, inputs)[1]

    assert set(range(len(units))) - set(kept) == {min(range(len(units)), key=cost)}


@pytest.mark.parametrize("size", [1, 2])
def test_several_removals_are_near_the_best_of_all_subsets(size: int) -> None:
    ratios = []
    for seed in range(8):
        weight, gram = _problem(8, seed=seed)
        units = [list(range(i, i + size)) for i in range(0, 8, size)]
        keep = len(units) // 2

        def cost(
            kept: tuple[int, ...], u: list[list[int]] = units, w: Tensor = weight, g: Tensor = gram
        ) -> float:
            return _refit(w, g, sorted(i for k in kept for i in u[k]))[1]

        every = sorted(map(cost, combinations(range(len(units)), keep)))
        found = cost(tuple(_greedy(weight, gram, units, keep, DAMPING)[0]))
        assert found < np.median(every)
        ratios.append(found / every[0])
    # Greedy is not exhaustive, but it is right most of the time.
    assert sum(r < 1.001 for r in ratios) >= 4
    assert max(ratios) < 2


def test_redundant_units_go_and_cost_nothing() -> None:
    generator = torch.Generator().manual_seed(0)
    source = torch.randn(500, 3, generator=generator, dtype=torch.float64)
    x = torch.cat([source, source @ torch.randn(3, 3, generator=generator).double()], 1)
    weight = torch.randn(4, 6, generator=generator)
    kept, fitted = _greedy(weight, x.T @ x / 500, [[i] for i in range(6)], 3, 1e-8)
    assert torch.allclose(x[:, kept].float() @ fitted.T, x.float() @ weight.T, atol=1e-3)


def test_many_units_go_some_at_a_time_to_the_exact_count() -> None:
    weight, gram = _problem(200)
    kept, fitted = _greedy(weight, gram, [[i] for i in range(200)], 77)
    assert len(kept) == 77
    np.testing.assert_allclose(fitted.numpy(), _refit(weight, gram, kept)[0], rtol=1e-3, atol=1e-3)


def test_all_and_none() -> None:
    weight, gram = _problem(6)
    units = [[i] for i in range(6)]
    kept, fitted = _greedy(weight, gram, units, 6)
    assert kept == list(range(6))
    assert torch.equal(fitted, weight)
    kept, fitted = _greedy(weight, gram, units, 0)
    assert kept == []
    assert fitted.shape == (5, 0)


def test_a_dead_input_goes_first() -> None:
    weight, gram = _problem(6)
    gram[2], gram[:, 2] = 0, 0
    weight[:, 2] = 1e-3
    assert _greedy(weight, gram, [[i] for i in range(6)], 5)[0] == [0, 1, 3, 4, 5]


def test_by_scores_takes_the_largest_sums_of_squares() -> None:
    scores = torch.tensor([[1.0, 0.0, 3.0, 3.0], [1.0, 4.0, 0.0, 3.0]])
    # by unit: (0, 1): 18, (2, 3): 27; single: 2, 16, 9, 18
    assert by_scores([scores], [torch.tensor([[0, 1], [2, 3]])], 1) == [1]
    assert by_scores([scores], [torch.tensor([[0], [1], [2], [3]])], 2) == [1, 3]


@pytest.mark.parametrize("seed", range(4))
def test_two_readers_lose_the_unit_of_least_shares(seed: int) -> None:
    problems = [_problem(8, seed=seed), _problem(16, out=3, seed=seed + 100)]
    columns = [torch.arange(8).unsqueeze(1), torch.arange(16).reshape(8, 2)]
    readers = [Reader(w, g, c) for (w, g), c in zip(problems, columns, strict=True)]
    kept, fitted = greedy_obs(readers, 7, DAMPING)

    def cost(gone: int) -> float:
        total = 0.0
        for (w, g), c in zip(problems, columns, strict=True):
            inputs = [i for u in range(8) if u != gone for i in c[u].tolist()]
            whole = float(((w.double() @ g) * w.double()).sum())
            total += _refit(w, g, inputs)[1] / whole
        return total

    assert set(range(8)) - set(kept) == {min(range(8), key=cost)}
    inputs = [i for u in kept for i in columns[1][u].tolist()]
    np.testing.assert_allclose(
        fitted[1][:, inputs].numpy(), _refit(*problems[1], inputs)[0], rtol=2e-5, atol=2e-5
    )


@pytest.mark.parametrize("seed", range(4))
def test_with_information_the_unit_of_least_loss_goes(seed: int) -> None:
    """tr(F D H D^T) / 2 of the best refit, F and H damped; among two readers the sum counts."""
    problems = [_problem(8, seed=seed), _problem(8, out=3, seed=seed + 100)]
    columns = torch.arange(8).unsqueeze(1)
    slopes = [torch.randn(50, 5).double(), torch.randn(50, 3).double() * 4]
    shapes = [s.T @ s / 50 for s in slopes]
    readers = [
        Reader(w, g, columns, f) for (w, g), f in zip(problems, shapes, strict=True)
    ]  # fmt: skip
    costs: list[Tensor] = []
    kept, fitted = greedy_obs(readers, 7, DAMPING, costs)

    def cost(gone: int) -> float:
        total = 0.0
        for (w, g), f in zip(problems, shapes, strict=True):
            left = [i for i in range(8) if i != gone]
            off = -w.double().clone()
            off[:, left] += torch.from_numpy(_refit(w, g, left)[0])
            h = g + DAMPING * g.diagonal().mean() * torch.eye(8)
            metric = f + 0.1 * f.diagonal().mean() * torch.eye(len(f))
            total += float(torch.trace(metric @ off @ h @ off.T)) / 2
        return total

    assert set(range(8)) - set(kept) == {min(range(8), key=cost)}
    assert float(costs[0]) == pytest.approx(min(map(cost, range(8))), rel=1e-5)
    np.testing.assert_allclose(
        fitted[1][:, kept].numpy(), _refit(*problems[1], kept)[0], rtol=2e-5, atol=2e-5
    )
