"""GPTQ against a hand-solved pair, a slow textbook OBQ, and round to nearest."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from penjing import grids
from penjing.errors import InputError
from penjing.planes import IntegerPlanes, Scheme
from penjing.quantizers import gptq, rtn


def problem(out: int, inputs: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(500, inputs, generator=generator)
    x = x @ torch.randn(inputs, inputs, generator=generator) + torch.randn(inputs)
    weight = torch.randn(out, inputs, generator=generator)
    return weight, (x.T @ x / 500).double()


def error(weight: torch.Tensor, planes: IntegerPlanes, gram: torch.Tensor) -> float:
    off = (planes.dequantize() - weight).double()
    return float(((off @ gram) * off).sum())


def test_two_columns_by_hand() -> None:
    # Symmetric 2 bits, codes -2..1, scale max(0.4 / 1, 2 / 2) = 1. Column 0: 0.4 goes to 0.
    # The best w1 then is -2 + 0.4 * H01 / H11 = -1.2, which goes to -1 and not to -2:
    # error 5 * 0.16 - 4 * 0.4 + 1 = 0.2 against 0.8.
    gram = torch.tensor([[5.0, 2.0], [2.0, 1.0]], dtype=torch.float64)
    weight = torch.tensor([[0.4, -2.0]])
    planes = gptq.fit(
        weight, Scheme(2, 0, True), SimpleNamespace(gram=gram), mse=False, damping=0.0, rounds=0
    )
    assert planes.dequantize().tolist() == [[0.0, -1.0]]
    assert error(weight, planes, gram) == pytest.approx(0.2, abs=1e-6)


def obq(weight: np.ndarray, gram: np.ndarray, grid: grids.Grid, order: np.ndarray) -> np.ndarray:
    """Column by column with the exact inverse of what is left (Optimal Brain Quantization)."""
    w = weight.astype(np.float64).copy()
    damped = gram + 0.01 * np.mean(np.diag(gram)) * np.eye(len(gram))
    codes = np.zeros(w.shape, dtype=np.uint8)
    left = list(order)
    while left:
        j = left[0]
        inverse = np.linalg.inv(damped[np.ix_(left, left)])
        place = j // grid.group
        scale = grid.scale[:, place].double().numpy()
        zero = grid.zero_point[:, place].double().numpy()
        codes[:, j] = np.clip(np.round(w[:, j] / scale) + zero, 0, grid.scheme.levels)
        off = (w[:, j] - scale * (codes[:, j] - zero)) / inverse[0, 0]
        w[:, left] -= np.outer(off, inverse[0])
        left = left[1:]
    return codes


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("scheme", [Scheme(4, 0), Scheme(3, 5), Scheme(2, 0, True)])
@pytest.mark.parametrize("block", [4, 128])
def test_equals_textbook_obq(act_order: bool, scheme: Scheme, block: int) -> None:
    weight, gram = problem(6, 17)
    planes = gptq.fit(
        weight,
        scheme,
        SimpleNamespace(gram=gram),
        act_order=act_order,
        mse=False,
        block=block,
        rounds=0,
    )
    order = np.argsort(-gram.diagonal().numpy()) if act_order else np.arange(17)
    wanted = obq(weight.numpy(), gram.numpy(), grids.min_max(weight, scheme), order)
    np.testing.assert_array_equal(planes.codes[0].numpy(), wanted)


@pytest.mark.parametrize("scheme", [Scheme(4, 16), Scheme(3), Scheme(2, 16), Scheme(4, 24, True)])
def test_beats_rounding_to_nearest(scheme: Scheme) -> None:
    weight, gram = problem(24, 200, 1)
    plain = error(weight, rtn.fit(weight, scheme), gram)
    assert error(weight, gptq.fit(weight, scheme, SimpleNamespace(gram=gram)), gram) < 0.6 * plain


def test_the_mse_grid_and_the_order_each_help() -> None:
    weight, gram = problem(32, 64, 2)
    gram = gram * torch.outer(torch.logspace(-1, 1, 64), torch.logspace(-1, 1, 64)).double()
    stats = SimpleNamespace(gram=gram)

    def run(**options: bool) -> float:
        return error(weight, gptq.fit(weight, Scheme(2, 16), stats, rounds=0, **options), gram)

    assert run() < 0.9 * run(mse=False)
    assert run() < 0.9 * run(act_order=False)


def test_blocks_do_not_change_the_codes() -> None:
    weight, gram = problem(8, 150, 3)
    stats = SimpleNamespace(gram=gram)
    codes = [gptq.fit(weight, Scheme(4, 32), stats, block=b).codes for b in (150, 128, 16)]
    # Float32 sums in another order may flip a rounding at the border, no more.
    for other in codes[1:]:
        assert (codes[0] != other).float().mean() < 0.01


def test_without_a_gram_each_column_is_alone() -> None:
    weight, _ = problem(8, 32)
    planes = gptq.fit(weight, Scheme(3, 8), None)
    eye = SimpleNamespace(gram=torch.eye(32).double())
    same = gptq.fit(weight, Scheme(3, 8), eye, rounds=0)
    assert torch.equal(planes.codes, same.codes)
    plain = gptq.fit(weight, Scheme(3, 8), None, mse=False)
    assert torch.equal(plain.codes, rtn.fit(weight, Scheme(3, 8)).codes)


def test_a_gram_of_another_layer_is_refused() -> None:
    with pytest.raises(InputError, match="Gram matrix"):
        gptq.fit(torch.ones(2, 3), Scheme(4), SimpleNamespace(gram=torch.eye(4)))
    nan = SimpleNamespace(gram=torch.full((3, 3), float("nan")))
    with pytest.raises(InputError, match="NaN"):
        gptq.fit(torch.ones(2, 3), Scheme(4), nan)


def test_rounds_are_never_worse_and_end_where_no_single_code_is_better() -> None:
    weight, gram = problem(6, 24, 4)
    stats = SimpleNamespace(gram=gram)
    smooth = gram + 0.01 * gram.diagonal().mean() * torch.eye(24)
    for scheme in (Scheme(2, 8), Scheme(3, 8, True), Scheme(4, scale_bits=16)):
        errors = [
            error(weight, gptq.fit(weight, scheme, stats, rounds=r, damping=0.01), smooth)
            for r in (0, 1, 4, 40)
        ]
        assert errors == sorted(errors, reverse=True)
        assert errors[2] < 0.97 * errors[0]
        planes = gptq.fit(weight, scheme, stats, rounds=40)
        least = error(weight, planes, smooth)
        better = 0
        for o in range(6):
            for i in range(24):
                for code in range(2 ** int(scheme.bits)):
                    other = planes.codes.clone()
                    other[0, o, i] = code
                    better += error(weight, replace(planes, codes=other), smooth) < least - 1e-6
        assert better <= 3  # a round may have ended a little before the last
