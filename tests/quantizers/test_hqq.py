"""HQQ against its update by hand, a brute force over zero points, and round to nearest."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from penjing.errors import UsageError
from penjing.planes import Scheme
from penjing.quantizers import hqq, rtn


def weights(out: int, inputs: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(out, inputs, generator=generator) ** 3 + 0.1


def power(back: torch.Tensor, weight: torch.Tensor, p: float, group: int) -> torch.Tensor:
    """Sum of |e|^p of each group."""
    inputs = weight.shape[1]
    parts = (back - weight).double().abs()
    # float32 of codes times scale: an error of nothing must not count as its p-th power.
    parts = torch.where(parts < 1e-6 * weight.abs().max(), 0.0, parts).pow(p)
    parts = torch.nn.functional.pad(parts, (0, -inputs % group))
    return parts.reshape(len(weight), -1, group).sum(-1)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("p", [0.5, 0.7, 1.0])
@pytest.mark.parametrize(("bits", "group"), [(2, 23), (3, 5), (4, 8), (8, 64)])
def test_never_worse_than_nearest_in_any_group(
    bits: int, group: int, p: float, symmetric: bool
) -> None:
    weight, scheme = weights(30, 23), Scheme(bits, group, symmetric)
    mine = power(hqq.fit(weight, scheme, p=p).dequantize(), weight, p, group)
    plain = power(rtn.fit(weight, scheme).dequantize(), weight, p, group)
    assert (mine <= plain * (1 + 1e-4) + 1e-9).all()


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_better_than_nearest(bits: int, whole: bool) -> None:
    weight = weights(64, 64)
    mine = power(hqq.fit(weight, Scheme(bits, 64), whole=whole).dequantize(), weight, 0.7, 64)
    plain = power(rtn.fit(weight, Scheme(bits, 64)).dequantize(), weight, 0.7, 64)
    assert mine.sum() < 0.985 * plain.sum()


def reference(row: np.ndarray, bits: int, p: float, beta: float, rounds: int) -> float:
    """The published iteration in numpy, float64, for one group; least sum of |e|^p."""
    levels = 2**bits - 1
    low, high = min(row.min(), 0), max(row.max(), 0)
    scale = (high - low) / levels
    zero, least = np.round(-low / scale), np.inf
    for _ in range(rounds):
        codes = np.clip(np.round(row / scale + zero), 0, levels)
        error = (row - scale * (codes - zero)) / scale
        least = min(least, float((np.abs(error * scale) ** p).sum()))
        size = np.maximum(np.abs(error), 1e-30)
        kept = np.sign(error) * np.maximum(size - size ** (p - 1) / beta, 0)
        zero = float(np.mean(codes - (row / scale - kept)))
        beta *= 1.01
    return least


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_the_published_iteration(bits: int) -> None:
    weight = weights(40, 32, 5)
    found = power(hqq.fit(weight, Scheme(bits), whole=False).dequantize(), weight, 0.7, 32)
    wanted = [reference(row, bits, 0.7, 10.0, 20) for row in weight.double().numpy()]
    # A rounding at the border may go the other way in float32.
    close = np.isclose(found[:, 0].numpy(), wanted, rtol=1e-3)
    assert close.mean() > 0.9


def test_the_scale_by_hand() -> None:
    # Zero point in the middle, scale 1, codes about it 1 and -1 (eight) and -2. Errors 0.2; with
    # p 1/2 and beta 20 the eight count as 0.8 + 0.2 - 0.2 ** -0.5 / 20 = 0.8882 and the scale
    # is (8 * 0.8882 + 2 * 2) / (8 + 4) = 0.92546: roots of the errors sum up to 3.22, not 3.58.
    weight = torch.tensor([[0.8, -0.8] * 4 + [-2.0]])
    assert float(rtn.fit(weight, Scheme(2, 0, True)).scale) == 1
    planes = hqq.fit(weight, Scheme(2, 0, True), p=0.5, beta=20.0, rounds=2)
    wanted = (8 * (1 - 0.2**-0.5 / 20) + 4) / 12
    assert float(planes.scale) == pytest.approx(wanted, rel=1e-5)
    once = hqq.fit(weight, Scheme(2, 0, True), p=0.5, beta=20.0, rounds=1)
    assert float(once.scale) == 1


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_close_to_the_best_scale(bits: int) -> None:
    weight, scheme = weights(24, 16, 2), Scheme(bits)
    mine = power(hqq.fit(weight, scheme).dequantize(), weight, 0.7, 16).sum()
    start = rtn.fit(weight, scheme)
    least = plain = power(start.dequantize(), weight, 0.7, 16)
    for factor in np.linspace(0.3, 1.2, 300):
        scale = start.scale[0] * float(factor)
        codes = ((weight / scale).round() + start.zero_point).clamp(0, scheme.levels)
        back = (codes - start.zero_point) * scale
        least = torch.minimum(least, power(back, weight, 0.7, 16))
    # Turn by turn ends in the nearest valley, not in the best one.
    assert least.sum() * 0.999 <= mine < plain.sum()


def test_few_large_errors_do_not_draw() -> None:
    # Fourteen weights on a grid a quarter step off, two far out. The mean error of a plain
    # average would follow the two; a power below 1 leaves the fourteen nearly exact.
    weight = torch.tensor([[0.25 + k % 3 for k in range(14)] + [3.0, 0.0]])
    back = hqq.fit(weight, Scheme(2), whole=False).dequantize()
    plain = rtn.fit(weight, Scheme(2)).dequantize()
    assert (back - weight)[0, :14].abs().mean() < 0.5 * (plain - weight)[0, :14].abs().mean()


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("width", [32, 16])
def test_zero_rows_constants_and_outliers(whole: bool, symmetric: bool, width: int) -> None:
    weight = weights(6, 21)
    weight[0] = 0
    weight[1] = -0.7
    weight[2, 4] = 1e4
    weight[3:, 8] = 0.25
    scheme = Scheme(4, 8, symmetric, scale_bits=width)
    back = hqq.fit(weight, scheme, whole=whole).dequantize()
    assert back.isfinite().all()
    assert (back[0] == 0).all()
    assert (back[1] + 0.7)[:8].abs().max() < 0.02
    assert back[2, 4] == pytest.approx(1e4, rel=0.1)


@pytest.mark.parametrize("size", [1e-35, 1e-12, 1e12, 1e35])
def test_units_do_not_matter(size: float) -> None:
    weight = weights(4, 16)
    wanted = hqq.fit(weight, Scheme(3, 8))
    found = hqq.fit(weight * size, Scheme(3, 8))
    assert (found.codes == wanted.codes).float().mean() > 0.97


def test_whole_zero_points_are_whole_and_data_are_not_used() -> None:
    weight = weights(8, 24)
    planes = hqq.fit(weight, Scheme(3, 8))
    zero = -planes.shift / planes.scale[0]
    torch.testing.assert_close(zero, zero.round(), rtol=0, atol=1e-4)
    assert planes.offset == "zero"
    same = hqq.fit(weight, Scheme(3, 8), SimpleNamespace(gram=torch.eye(24).double()))
    assert torch.equal(planes.codes, same.codes)


@pytest.mark.parametrize("p", [0.0, -0.5, 1.5, float("nan")])
def test_a_power_outside_is_refused(p: float) -> None:
    with pytest.raises(UsageError, match="power"):
        hqq.fit(torch.ones(1, 2), Scheme(4), p=p)
