"""Kernels: the rounding of least error, and never worse than the nearest."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from penjing import grids, kernels
from penjing.errors import InputError
from penjing.planes import Scheme


def smooth(groups: int, row: int, seed: int = 0) -> Tensor:
    """Gram matrices of inputs that are nearly equal, as in neighbouring places."""
    g = torch.Generator().manual_seed(seed)
    common = torch.randn(groups, 500, 1, generator=g, dtype=torch.float64)
    x = common + 0.2 * torch.randn(groups, 500, row, generator=g, dtype=torch.float64)
    return x.transpose(1, 2) @ x / 500


def loss(made: Tensor, weight: Tensor, grams: Tensor) -> Tensor:
    error = (made - weight).double()
    each = len(weight) // len(grams)
    return torch.stack([e @ grams[o // each] @ e for o, e in enumerate(error)])


@pytest.mark.parametrize(("bits", "least"), [(8, 2.0), (7, 2.0), (4, 1.5)])
def test_much_less_error_than_the_nearest(bits: int, least: float) -> None:
    torch.manual_seed(0)
    weight, grams = torch.randn(24, 9), smooth(12, 9)
    scheme = Scheme(bits, 0, True)
    plain = grids.min_max(weight, scheme)
    nearest = grids.to_planes(plain.codes(weight), plain).dequantize()
    made = kernels.fit(weight, scheme, grams).dequantize()
    was, now = loss(nearest, weight, grams), loss(made, weight, grams)
    # A little damping is in what is minimised and not in what is measured here.
    assert bool((now <= was * 1.05).all())
    assert float(was.sum()) > least * float(now.sum())


def test_near_the_best_of_all_roundings() -> None:
    torch.manual_seed(1)
    weight, grams = torch.randn(6, 3), smooth(6, 3, 1)
    scheme = Scheme(3, 0, True)
    made = kernels.fit(weight, scheme, grams)
    now = loss(made.dequantize(), weight, grams)
    scale = made.scale[0]  # [out, 1]
    every = torch.tensor(list(itertools.product(range(-4, 4), repeat=3)), dtype=torch.float32)
    for o in range(6):
        some = loss(every * scale[o], weight[o].expand(len(every), 3), grams[o : o + 1])
        assert float(now[o]) <= 2.5 * float(some.min()) + 1e-3


def test_kernels_of_zeros_and_inputs_of_zeros() -> None:
    weight = torch.randn(4, 9)
    weight[1] = 0
    grams = smooth(4, 9)
    grams[2] = 0
    made = kernels.fit(weight, Scheme(8, 0, True), grams).dequantize()
    assert not made[1].any()
    assert torch.isfinite(made).all()
    torch.testing.assert_close(made[2], weight[2], rtol=0, atol=float(weight[2].abs().max()) / 100)


@pytest.mark.parametrize("shape", [(9, 9), (4, 8, 8), (3, 9, 9)])
def test_grams_that_do_not_fit(shape: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match="Gram matrices of kernels"):
        kernels.fit(torch.randn(4, 9), Scheme(8, 0, True), torch.ones(shape).double())


def test_grams_with_nan() -> None:
    with pytest.raises(InputError, match="NaN"):
        kernels.fit(torch.randn(1, 4), Scheme(8, 0, True), torch.full((1, 4, 4), torch.nan))
