"""Grids against hand-computed numbers and brute force in numpy."""

import numpy as np
import pytest
import torch

from penjing import grids
from penjing.errors import InputError
from penjing.planes import Scheme


def test_min_max_by_hand() -> None:
    # Range -1 to 2 in 3 steps: scale 1, zero point 1. Row of positives: range 0 to 6, scale 2.
    weight = torch.tensor([[-1.0, 2.0, 0.6, 0.4], [3.0, 6.0, 5.0, 1.0]])
    grid = grids.min_max(weight, Scheme(2))
    assert grid.scale.tolist() == [[1.0], [2.0]]
    assert grid.zero_point.tolist() == [[1.0], [0.0]]
    assert grid.shift.tolist() == [[-1.0], [0.0]]
    # 3 / 2 = 1.5 and 5 / 2 = 2.5 go to the even 2; 1 / 2 = 0.5 to 0.
    assert grid.codes(weight).tolist() == [[0, 3, 2, 1], [2, 3, 2, 0]]


def test_symmetric_min_max_clips_nothing() -> None:
    # Three bits, codes 0..7 about 4: -4..3. The row of -8..3 needs 2, that of -4..9 needs 3.
    weight = torch.tensor([[-8.0, 3.0], [-4.0, 9.0]])
    grid = grids.min_max(weight, Scheme(3, symmetric=True))
    assert grid.scale.tolist() == [[2.0], [3.0]]
    assert grid.zero_point.tolist() == [[4.0], [4.0]]


def test_groups_do_not_see_each_other_and_the_last_may_be_short() -> None:
    weight = torch.tensor([[0.0, 3.0, 0.0, 30.0, 300.0]])
    assert grids.min_max(weight, Scheme(2, 2)).scale.tolist() == [[1.0, 10.0, 100.0]]


@pytest.mark.parametrize("symmetric", [False, True])
def test_constant_zero_tiny_and_huge_groups(symmetric: bool) -> None:
    weight = torch.tensor([[0.0] * 4, [0.7] * 4, [-0.7] * 4, [1e-45] * 4, [3e38, -3e38, 0, 0]])
    grid = grids.min_max(weight, Scheme(4, symmetric=symmetric))
    assert (grid.scale > 0).all()
    assert torch.isfinite(grid.scale).all()
    planes = grids.to_planes(grid.codes(weight), grid)
    back = planes.dequantize()[:4]
    np.testing.assert_allclose(back.numpy(), weight[:4].numpy(), rtol=0.08, atol=1e-40)
    assert (back[0] == 0).all()


def test_mse_grid_is_the_best_of_the_factors_by_brute_force() -> None:
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(3, 10, generator=generator) ** 3
    importance = torch.rand(10, generator=generator) + 0.1
    scheme = Scheme(3, 4)
    grid = grids.mse(weight, scheme, importance)
    for row in range(3):
        for place, part in enumerate((slice(0, 4), slice(4, 8), slice(8, 10))):
            w = weight[row, part].double().numpy()
            low, high = min(w.min(), 0), max(w.max(), 0)
            base = (high - low) / 7
            zero = np.round(-low / base)

            def error(
                scale: float, w: np.ndarray = w, zero: float = zero, part: slice = part
            ) -> float:
                code = np.clip(np.round(w / scale) + zero, 0, 7)
                return float((importance[part].numpy() * ((code - zero) * scale - w) ** 2).sum())

            best = min(error(base * (1 - 0.02 * k)) for k in range(40))
            assert error(float(grid.scale[row, place])) == pytest.approx(best, rel=1e-3)


def test_mse_needs_no_importance_and_never_loses_to_min_max() -> None:
    weight = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
    scheme = Scheme(2, 16)

    def errors(grid: grids.Grid) -> torch.Tensor:
        back = grids.to_planes(grid.codes(weight), grid).dequantize()
        return (back - weight).square().reshape(8, 4, 16).sum(-1)

    plain, shrunk = errors(grids.min_max(weight, scheme)), errors(grids.mse(weight, scheme))
    assert (shrunk <= plain * (1 + 1e-5)).all()
    assert shrunk.sum() < 0.9 * plain.sum()


def test_empty_weights() -> None:
    for shape in ((0, 4), (3, 0)):
        grid = grids.mse(torch.zeros(shape), Scheme(4, 2))
        assert grids.to_planes(grid.codes(torch.zeros(shape)), grid).dequantize().shape == shape


def test_what_is_not_a_weight_is_refused() -> None:
    for bad in (torch.ones(2), torch.ones(2, 2, dtype=torch.int8)):
        with pytest.raises(InputError, match="a weight to quantize"):
            grids.check_weight(bad)
    with pytest.raises(InputError, match="NaN"):
        grids.check_weight(torch.tensor([[float("nan")]]))


def _paired(seed: int = 0, rows: int = 64, width: int = 31) -> torch.Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed)) ** 3


def _largest_sum(codes: np.ndarray) -> int:
    """Of two neighbours, times any two unsigned bytes, over 255."""
    whole = np.pad(codes.astype(int) - 128, ((0, 0), (0, codes.shape[1] % 2)))
    return int(np.abs(whole[:, ::2] + whole[:, 1::2]).max())


def test_paired_codes_by_hand() -> None:
    # Alone 1.0 would have the code 127, but 0.9 stands beside it: (1 + 0.9) / 128 a step.
    weight = torch.tensor([[1.0, 0.9, 0.1, -1.0], [1.0, -1.0, 0.5, 0.25]])
    grid = grids.min_max(weight, Scheme(8, symmetric=True, paired=True))
    np.testing.assert_allclose(grid.scale[:, 0], [1.9 / 128, 1 / 127], rtol=1e-6)
    # 67.4 and 60.6 round to 67 and 61, together 128; 127 and -127 are no sum at all.
    assert (grid.codes(weight).int() - 128).tolist() == [[67, 61, 7, -67], [127, -127, 64, 32]]


@pytest.mark.parametrize("factor", [1.0, 0.6, 0.3])
def test_paired_codes_never_exceed_16_bits(factor: float) -> None:
    """Whatever the scale; and nothing else than what exceeds is moved."""
    weight, scheme = _paired(), Scheme(8, symmetric=True, paired=True)
    whole = grids.min_max(weight, scheme)
    grid = grids.Grid(whole.scale * factor, whole.zero_point, scheme, whole.group)
    codes = grid.codes(weight).numpy()
    assert _largest_sum(codes) <= 128
    free = grids.Grid(grid.scale, grid.zero_point, Scheme(8, symmetric=True), grid.group)
    alone = free.codes(weight).numpy().astype(int)
    pad = np.pad(alone - 128, ((0, 0), (0, 1)))
    fits = (np.abs(pad[:, ::2] + pad[:, 1::2]) <= 128).repeat(2, 1)[:, :31]
    assert np.array_equal(codes[fits], alone[fits])
    if factor < 1:
        assert _largest_sum(alone) > 128


def test_every_choice_within_the_limits_is_allowed() -> None:
    weight, scheme = _paired(1), Scheme(8, symmetric=True, paired=True)
    grid = grids.mse(weight, scheme)
    low, high = (side.numpy() for side in grids.limits(weight, grid))
    own = grid.codes(weight).numpy()
    assert (low <= own).all()
    assert (own <= high).all()
    assert low.min() >= 0
    assert high.max() <= 255
    rng = np.random.default_rng(0)
    for _ in range(20):
        assert _largest_sum(np.where(rng.random(own.shape) < 0.5, low, high)) <= 128


def test_paired_grids_are_finer_than_those_of_seven_bits() -> None:
    weight = _paired(2, 256, 64)
    errors = [
        (grids.to_planes(grid.codes(weight), grid).dequantize() - weight).square().mean()
        for scheme in (Scheme(8, symmetric=True, paired=True), Scheme(7, symmetric=True))
        for grid in [grids.mse(weight, scheme)]
    ]
    assert errors[0] < 0.5 * errors[1]
