"""AdaRound against all combinations of roundings, and round to nearest on its grid."""

import itertools
from types import SimpleNamespace

import pytest
import torch

from penjing import grids
from penjing.errors import InputError
from penjing.planes import IntegerPlanes, Scheme
from penjing.quantizers import _feedback, adaround


def problem(out: int, inputs: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(300, inputs, generator=generator)
    x = x @ torch.randn(inputs, inputs, generator=generator)
    return torch.randn(out, inputs, generator=generator), (x.T @ x / 300).double()


def errors(weight: torch.Tensor, back: torch.Tensor, gram: torch.Tensor) -> torch.Tensor:
    off = (back - weight).double()
    return ((off @ gram) * off).sum(1)


def start(weight: torch.Tensor, scheme: Scheme, gram: torch.Tensor) -> grids.Grid:
    return grids.mse(weight, scheme, _feedback.damped(gram).diagonal())


def fit(weight: torch.Tensor, scheme: Scheme, gram: torch.Tensor, **more: float) -> IntegerPlanes:
    return adaround.fit(weight, scheme, SimpleNamespace(gram=gram), **more)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [2, 4])
def test_close_to_the_best_of_all_roundings(bits: int, symmetric: bool) -> None:
    scheme, sums = Scheme(bits, 0, symmetric), [0.0, 0.0, 0.0]
    for seed in range(12):
        weight, gram = problem(2, 3, seed)
        grid = start(weight, scheme, gram)
        mine = errors(weight, fit(weight, scheme, gram).dequantize(), gram)
        below = (weight / grid.scale).floor() + grid.zero_point
        made = [
            (below + torch.tensor(up)).clamp(0, scheme.levels) * grid.scale + grid.shift
            for up in itertools.product([0.0, 1.0], repeat=3)
        ]
        least = torch.stack([errors(weight, m, gram) for m in made]).amin(0)
        plain = errors(weight, grids.to_planes(grid.codes(weight), grid).dequantize(), gram)
        assert (mine >= least * (1 - 1e-4) - 1e-9).all()
        assert (mine <= plain * (1 + 1e-4) + 1e-9).all()
        for i, part in enumerate((mine, least, plain)):
            sums[i] += float(part.sum())
    assert sums[2] > 1.05 * sums[1]  # else there is nothing to learn
    assert sums[0] < sums[1] + 0.25 * (sums[2] - sums[1])


@pytest.mark.parametrize("scheme", [Scheme(2, 8), Scheme(3), Scheme(4, 16), Scheme(4, 0, True)])
def test_much_better_than_nearest_and_no_weight_moves_a_step(scheme: Scheme) -> None:
    weight, gram = problem(20, 48, 1)
    grid = start(weight, scheme, gram)
    nearest = grid.codes(weight)
    planes = fit(weight, scheme, gram)
    mine = errors(weight, planes.dequantize(), gram)
    plain = errors(weight, grids.to_planes(nearest, grid).dequantize(), gram)
    assert (mine <= plain).all()
    assert mine.sum() < 0.6 * plain.sum()
    assert torch.equal(planes.scale[0], grid.scale)
    assert (planes.codes[0].int() - nearest.int()).abs().max() == 1


def test_rows_beyond_one_batch_are_learnt_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, gram = problem(7, 12, 2)
    whole = fit(weight, Scheme(3), gram)
    monkeypatch.setattr(adaround._rounding, "ROWS", 3)
    assert (fit(weight, Scheme(3), gram).codes == whole.codes).float().mean() > 0.97


def test_without_rounds_or_data_it_is_round_to_nearest() -> None:
    weight, gram = problem(5, 12)
    grid = start(weight, Scheme(3), gram)
    assert torch.equal(fit(weight, Scheme(3), gram, rounds=0).codes[0], grid.codes(weight))
    blind = adaround.fit(weight, Scheme(3), None)
    assert torch.equal(blind.codes[0], grids.mse(weight, Scheme(3)).codes(weight))


def test_a_diagonal_gram_leaves_the_nearest() -> None:
    weight, _ = problem(6, 10)
    gram = torch.diag(torch.linspace(0.1, 2, 10)).double()
    grid = start(weight, Scheme(4), gram)
    assert torch.equal(fit(weight, Scheme(4), gram).codes[0], grid.codes(weight))


def test_bad_statistics_are_named() -> None:
    with pytest.raises(InputError, match="Gram matrix"):
        fit(torch.ones(2, 3), Scheme(4), torch.eye(4))
    bad = torch.eye(3).double()
    bad[0, 1] = float("nan")
    with pytest.raises(InputError, match="NaN"):
        fit(torch.ones(2, 3), Scheme(4), bad)
