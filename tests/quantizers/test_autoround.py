"""SignRound: a first round in numpy, all combinations of roundings, and round to nearest."""

import itertools
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from penjing import grids
from penjing.errors import InputError
from penjing.planes import IntegerPlanes, Scheme
from penjing.quantizers import _feedback, autoround


def problem(out: int, inputs: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(300, inputs, generator=generator)
    x = x @ torch.randn(inputs, inputs, generator=generator)
    return torch.randn(out, inputs, generator=generator), (x.T @ x / 300).double()


def errors(weight: torch.Tensor, back: torch.Tensor, gram: torch.Tensor) -> torch.Tensor:
    off = (back - weight).double()
    return ((off @ gram) * off).sum(1)


def nearest(weight: torch.Tensor, scheme: Scheme, gram: torch.Tensor) -> torch.Tensor:
    grid = grids.mse(weight, scheme, _feedback.damped(gram).diagonal())
    return grids.to_planes(grid.codes(weight), grid).dequantize()


def fit(weight: torch.Tensor, scheme: Scheme, gram: torch.Tensor, **more: float) -> IntegerPlanes:
    return autoround.fit(weight, scheme, SimpleNamespace(gram=gram), **more)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [2, 4])
def test_among_all_roundings_of_its_own_grid(bits: int, symmetric: bool) -> None:
    scheme, sums = Scheme(bits, 0, symmetric), [0.0, 0.0, 0.0]
    for seed in range(12):
        weight, gram = problem(2, 3, seed)
        planes = fit(weight, scheme, gram)
        scale, shift = planes.scale[0], planes.shift
        mine = errors(weight, planes.dequantize(), gram)
        below = ((weight - shift) / scale).floor()
        made = [
            (below + torch.tensor(up)).clamp(0, scheme.levels) * scale + shift
            for up in itertools.product([0.0, 1.0], repeat=3)
        ]
        least = torch.stack([errors(weight, m, gram) for m in made]).amin(0)
        assert (mine >= least * (1 - 1e-3) - 1e-9).all()
        for i, part in enumerate(
            (mine, least, errors(weight, nearest(weight, scheme, gram), gram))
        ):
            sums[i] += float(part.sum())
    assert sums[0] < 0.95 * sums[2]


@pytest.mark.parametrize("width", [32, 16, 8])
@pytest.mark.parametrize("scheme", [(2, 8, False), (3, 0, False), (4, 16, False), (4, 0, True)])
def test_better_than_nearest(scheme: tuple[int, int, bool], width: int) -> None:
    weight, gram = problem(20, 48, 1)
    made = Scheme(*scheme, scale_bits=width)
    mine = errors(weight, fit(weight, made, gram).dequantize(), gram).sum()
    assert mine < 0.97 * errors(weight, nearest(weight, made, gram), gram).sum()


@pytest.mark.parametrize("seed", range(6))
def test_never_worse_than_its_start_even_with_a_foolish_rate(seed: int) -> None:
    weight, gram = problem(3, 9, seed)
    for rate in (1e-6, 0.5, 10.0):
        planes = fit(weight, Scheme(2, 4), gram, rate=rate, rounds=5)
        mine = errors(weight, planes.dequantize(), gram).sum()
        assert mine <= errors(weight, nearest(weight, Scheme(2, 4), gram), gram).sum() * 1.00001


@pytest.mark.parametrize("seed", range(5))
def test_one_round_in_numpy(seed: int) -> None:
    weight, gram = problem(40, 6, seed)
    scheme, rate = Scheme(2, 0, True), 0.1
    h, w = gram.numpy(), weight.double().numpy()
    # The grid of least error under the diagonal, by its own definition.
    s = grids.mse(weight, scheme, _feedback.damped(gram).diagonal()).scale.double().numpy()

    def made(v: np.ndarray, s: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        steps = np.round(w / s + v)
        codes = np.clip(steps, -2, 1)
        return codes, codes == steps, codes * s - w

    codes, inside, e = made(np.zeros_like(w), s)
    slope = e @ h
    v = -rate * np.sign(slope * inside)
    by_scale = (slope * (codes - inside * w / s)).sum(1, keepdims=True)
    after, _, e1 = made(v, s * (1 - rate * np.sign(by_scale)))
    better = ((e1 @ h) * e1).sum(1) < ((e @ h) * e).sum(1)
    assert better.sum() > 0
    wanted = np.where(better[:, None], after, codes) + 2
    planes = fit(weight, scheme, gram, rounds=1, rate=rate, damping=0.0)
    assert (planes.codes[0].numpy() == wanted).mean() > 0.99


def test_rows_beyond_one_batch_are_learnt_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, gram = problem(7, 12, 2)
    whole = fit(weight, Scheme(3), gram)
    monkeypatch.setattr(autoround._rounding, "ROWS", 3)
    assert (fit(weight, Scheme(3), gram).codes == whole.codes).float().mean() > 0.97


def test_zero_weights_stay_zero() -> None:
    weight, gram = problem(8, 32, 4)
    weight[:, ::3] = 0
    for symmetric in (False, True):
        back = fit(weight, Scheme(3, 8, symmetric), gram).dequantize()
        assert (back[:, ::3] == 0).all()


def test_without_rounds_or_data_it_is_round_to_nearest() -> None:
    weight, gram = problem(5, 12)
    back = fit(weight, Scheme(3), gram, rounds=0).dequantize()
    torch.testing.assert_close(back, nearest(weight, Scheme(3), gram))
    blind = autoround.fit(weight, Scheme(3), None)
    assert torch.equal(blind.codes[0], grids.mse(weight, Scheme(3)).codes(weight))


def test_bad_statistics_are_named() -> None:
    with pytest.raises(InputError, match="Gram matrix"):
        fit(torch.ones(2, 3), Scheme(4), torch.eye(4))
    with pytest.raises(InputError, match="NaN"):
        fit(torch.ones(2, 3), Scheme(4), torch.eye(3).double() * float("inf"))
