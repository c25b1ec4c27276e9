import math

import numpy as np
import pytest
import torch

from penjing import grids
from penjing.errors import InputError
from penjing.migration import activation_aware, divisors, input_scales
from penjing.planes import Scheme


def inputs(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(200, 12, generator=generator) * torch.logspace(-1, 1, 12)
    return x, torch.randn(7, 12, generator=generator)


def test_by_hand() -> None:
    # sqrt(peak / widest) = sqrt(16 / 1), sqrt(4 / 4), sqrt(1 / 16): 4, 1, 1/4; mean of logs 0.
    weight = torch.tensor([[1.0, -4.0, 2.0], [0.5, 1.0, -16.0]])
    found = divisors(torch.tensor([16.0, 4.0, 1.0]), [weight], alpha=0.5, floor=0.0)
    torch.testing.assert_close(found, torch.tensor([4.0, 1.0, 0.25]))


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.9, 1.0])
def test_smoothquants_formula_over_its_geometric_mean(alpha: float) -> None:
    x, weight = inputs()
    other = 3 * inputs(1)[1]
    peak = x.abs().amax(0)
    found = divisors(peak, [weight, other], alpha, floor=0.0).numpy()
    widest = np.abs(np.concatenate([weight.numpy(), other.numpy()])).max(0)
    wanted = peak.numpy() ** alpha / widest ** (1 - alpha)
    np.testing.assert_allclose(found, wanted / np.exp(np.log(wanted).mean()), rtol=1e-5)


@pytest.mark.parametrize("seed", range(3))
def test_the_product_is_what_it_was(seed: int) -> None:
    x, weight = (t.double() for t in inputs(seed))
    c = divisors(x.abs().amax(0), [weight]).double()
    torch.testing.assert_close((x / c) @ (weight * c).T, x @ weight.T, rtol=1e-12, atol=1e-12)
    # Powers of two lose nothing in float32 either.
    c = torch.exp2(c.log2().round()).float()
    assert torch.equal((x.float() / c) * (weight[0].float() * c), x.float() * weight[0].float())


def test_inputs_come_out_alike() -> None:
    x, weight = inputs()
    c = divisors(x.abs().amax(0), [torch.ones_like(weight)], 1.0, 0.0)
    left = (x / c).abs().amax(0)
    assert float(left.max() / left.min()) == pytest.approx(1, rel=1e-5)


def test_an_idle_channel_counts_as_the_floor() -> None:
    peak = torch.tensor([1.0, 1.0, 1.0, 1e-6])
    found = divisors(peak, [torch.ones(2, 4)], alpha=1.0, floor=0.5)
    rms = math.sqrt(3 / 4)
    assert float(found[0] / found[3]) == pytest.approx(1 / (0.5 * rms), rel=1e-5)


@pytest.mark.parametrize("size", [1e-30, 1e-7, 1.0, 1e30])
def test_units_do_not_matter(size: float) -> None:
    x, weight = inputs()
    peak = x.abs().amax(0)
    wanted = divisors(peak, [weight])
    torch.testing.assert_close(divisors(peak * size, [weight]), wanted, rtol=1e-4, atol=0)
    torch.testing.assert_close(divisors(peak, [weight * size]), wanted, rtol=1e-4, atol=0)


@pytest.mark.parametrize("floor", [0.0, 1.0])
@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_nothing_there_still_gives_factors(alpha: float, floor: float) -> None:
    peak, weight = torch.rand(5) + 0.1, torch.randn(3, 5)
    dead, idle = weight.clone(), peak.clone()
    dead[:, 2], idle[1] = 0, 0
    for p, w in [(peak * 0, weight), (peak, weight * 0), (idle, dead), (peak * 0, weight * 0)]:
        found = divisors(p, [w], alpha, floor)
        assert found.isfinite().all()
        assert (found > 0).all()
        assert float(found.double().log().mean()) == pytest.approx(0, abs=1e-5)
    torch.testing.assert_close(divisors(peak * 0, [weight * 0], alpha, floor), torch.ones(5))


def test_one_channel_is_not_divided() -> None:
    assert divisors(torch.tensor([7.0]), [torch.tensor([[3.0]])]).tolist() == [1.0]


def test_bad_input_is_named() -> None:
    for weights in ([], [torch.ones(2, 4)], [torch.ones(3)], [torch.ones(0, 3)]):
        with pytest.raises(InputError, match="weights of a migration"):
            divisors(torch.ones(3), weights)
    with pytest.raises(InputError, match="NaN"):
        divisors(torch.tensor([1.0, math.nan]), [torch.ones(1, 2)])
    with pytest.raises(InputError, match="NaN"):
        divisors(torch.ones(2), [torch.tensor([[1.0, math.inf]])])


def test_peaks_of_ranges() -> None:
    low, high = torch.tensor([-3.0, 0.5, -1.0]), torch.tensor([2.0, 4.0, -0.5])
    assert input_scales(low, high).tolist() == [3.0, 4.0, 1.0]


def nearest(weight: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
    grid = grids.min_max(weight, Scheme(3))
    return grids.to_planes(grid.codes(weight), grid).dequantize()


@pytest.mark.parametrize("seed", range(3))
def test_awq_is_the_best_of_its_powers_on_the_data_themselves(seed: int) -> None:
    x, weight = inputs(seed)
    x, weights = x.double(), [weight, inputs(seed + 9)[1]]
    found = activation_aware([x.T @ x / len(x)] * 2, weights, nearest).double()

    def change(s: torch.Tensor) -> float:
        """Of the outputs, from data."""
        s = s.float()
        backs = [(nearest(w * s, s) / s - w).double() for w in weights]
        return sum(float((x @ off.T).square().sum()) for off in backs)

    norm = x.square().mean(0).sqrt()
    powers = [norm ** (k / 20) for k in range(20)]
    errors = [change(s / s.log().mean().exp()) for s in powers]
    assert change(found) == pytest.approx(min(errors), rel=1e-3)
    assert change(found) < 0.7 * errors[0]
    assert float(found.log().mean()) == pytest.approx(0, abs=1e-6)
    torch.testing.assert_close((x / found) @ (weight * found).T, x @ weight.double().T)


def test_awq_leaves_channels_of_one_size() -> None:
    weight = inputs()[1]
    assert torch.equal(activation_aware([torch.eye(12) * 3], [weight], nearest), torch.ones(12))
    assert torch.equal(activation_aware([torch.zeros(12, 12)], [weight], nearest), torch.ones(12))


def test_awq_gives_the_gram_matrix_of_the_divided_input() -> None:
    x, weight = inputs()
    gram = (x.T @ x / len(x)).double()
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []

    def note(scaled: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
        seen.append((scaled, own))
        return scaled.round()

    activation_aware([gram], [weight], note, steps=3)
    for scaled, own in seen:
        s = (scaled / weight)[0]
        divided = x / s
        torch.testing.assert_close(own.float(), divided.T @ divided / len(x), rtol=1e-3, atol=1e-4)
    assert len(seen) == 3


def test_awq_with_a_dead_input_and_bad_ones() -> None:
    x, weight = inputs()
    x[:, 3] = 0
    found = activation_aware([(x.T @ x).double()], [weight], nearest)
    assert found.isfinite().all()
    assert (found > 0).all()
    with pytest.raises(InputError, match="Gram matrix"):
        activation_aware([torch.ones(3, 4)], [torch.ones(2, 3)], nearest)
    with pytest.raises(InputError, match="weights"):
        activation_aware([torch.eye(4)], [torch.ones(2, 3)], nearest)
    bad = torch.eye(3)
    bad[0, 1] = math.nan
    with pytest.raises(InputError, match="NaN"):
        activation_aware([bad], [torch.ones(2, 3)], nearest)


def test_awq_of_columns_that_are_one_channel() -> None:
    """Two heads of queries that read one head of values: as one layer of both halves' outputs."""
    x, first = inputs()
    second = inputs(4)[1]
    pair = torch.cat([x, x], 1)
    columns = torch.arange(12).repeat(2)
    gram = (pair.T @ pair).double()
    weight = torch.cat([first, second], 1)
    found = activation_aware([gram], [weight], lambda w, _: w.round(), columns=[columns])
    assert found.shape == (12,)
    norm = x.square().mean(0).sqrt()
    powers = [(norm ** (k / 20)) for k in range(20)]
    scales = [p / p.log().mean().exp() for p in powers]

    def change(s: torch.Tensor) -> float:
        off = (weight * s.repeat(2)).round() / s.repeat(2) - weight
        return float((pair @ off.T).square().sum())

    assert change(found) == pytest.approx(min(change(s) for s in scales), rel=1e-3)
    with pytest.raises(InputError, match="columns"):
        activation_aware([gram], [weight], nearest, columns=[columns[:-1]])
