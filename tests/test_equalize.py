import math

import pytest
import torch
from torch.nn import functional as F

from penjing.equalize import Pair, clips, correct_bias, equalize, factors
from penjing.errors import InputError


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def linear(seed: int = 0) -> tuple[torch.Tensor, Pair]:
    g = generator(seed)
    first = torch.randn(9, 5, generator=g) * torch.logspace(-2, 1, 9)[:, None]
    pair = Pair(first, torch.randn(9, generator=g), torch.randn(4, 9, generator=g))
    return torch.randn(50, 5, generator=g).double(), Pair(*(t.double() for t in pair))


def test_by_hand() -> None:
    # Channel 0: 4 makes it, 1 reads it: sqrt(4 * 1) / 1 = 2. Channel 1: 1 and 9: 3 / 9.
    first = torch.tensor([[4.0, -1.0], [0.5, 1.0]])
    second = torch.tensor([[-1.0, 9.0], [0.5, 2.0]])
    found = factors(first, second)
    torch.testing.assert_close(found, torch.tensor([2.0, 1 / 3]))
    made = equalize(Pair(first, torch.tensor([2.0, 3.0]), second))
    torch.testing.assert_close(made.first, torch.tensor([[2.0, -0.5], [1.5, 3.0]]))
    torch.testing.assert_close(made.bias, torch.tensor([1.0, 9.0]))
    torch.testing.assert_close(made.second, torch.tensor([[-2.0, 3.0], [1.0, 2 / 3]]))


@pytest.mark.parametrize(
    "between", [F.relu, F.leaky_relu, lambda x: x], ids=["relu", "leaky", "id"]
)
def test_linear_layers_compute_what_they_did(between: object) -> None:
    x, pair = linear()
    made = equalize(pair)

    def run(p: Pair) -> torch.Tensor:
        return F.linear(between(F.linear(x, p.first, p.bias)), p.second)  # type: ignore[operator]

    torch.testing.assert_close(run(made), run(pair), rtol=1e-9, atol=1e-9)
    assert not torch.allclose(made.first, pair.first)


@pytest.mark.parametrize("groups", [1, 2, 6])
def test_convolutions_compute_what_they_did(groups: int) -> None:
    g = generator(1)
    first = (
        torch.randn(6, 3, 3, 3, generator=g).double()
        * torch.logspace(-1, 1, 6)[:, None, None, None]
    )
    second = torch.randn(12, 6 // groups, 3, 3, generator=g).double()
    pair = Pair(first, torch.randn(6, generator=g).double(), second)
    made = equalize(pair, groups=groups)
    x = torch.randn(2, 3, 9, 9, generator=g).double()

    def run(p: Pair) -> torch.Tensor:
        return F.conv2d(F.conv2d(x, p.first, p.bias, padding=1).relu(), p.second, groups=groups,
                        padding=1)  # fmt: skip

    torch.testing.assert_close(run(made), run(pair), rtol=1e-9, atol=1e-9)
    # Channel by channel both layers have the same range: that is what it is for.
    rows = made.first.abs().flatten(1).amax(1)
    own = 6 // groups
    columns = [
        float(made.second[c // own * (12 // groups) : (c // own + 1) * (12 // groups), c % own]
              .abs().max())
        for c in range(6)
    ]  # fmt: skip
    torch.testing.assert_close(rows, torch.tensor(columns).double(), rtol=1e-5, atol=0)


def test_relu6_is_exact_with_its_own_clips_only() -> None:
    x, pair = linear(2)
    x = 4 * x
    scale = factors(pair.first, pair.second)
    made = equalize(pair)
    hidden = F.linear(x, pair.first, pair.bias)
    assert (hidden > 6).any()
    wanted = F.linear(hidden.clamp(0, 6), pair.second)
    inner = F.linear(x, made.first, made.bias)
    own = torch.minimum(inner.clamp_min(0), clips(scale).double())
    torch.testing.assert_close(F.linear(own, made.second), wanted, rtol=1e-6, atol=1e-6)
    assert not torch.allclose(F.linear(inner.clamp(0, 6), made.second), wanted, rtol=1e-2)
    calm = (hidden.amax(1) < 6) & (inner.amax(1) < 6)
    assert 0 < int(calm.sum()) < len(x)
    same = F.linear(inner.clamp(0, 6), made.second)[calm]
    torch.testing.assert_close(same, wanted[calm], rtol=1e-9, atol=1e-9)


def test_gelu_is_not_exact() -> None:
    x, pair = linear(3)
    made = equalize(pair)
    run = [F.linear(F.gelu(F.linear(x, p.first, p.bias)), p.second) for p in (pair, made)]
    assert not torch.allclose(run[0], run[1], rtol=1e-2)


def test_equalised_twice_is_equalised_once() -> None:
    _, pair = linear()
    made = equalize(pair)
    torch.testing.assert_close(factors(made.first, made.second), torch.ones(9))


def test_rounding_loses_less_after_it() -> None:
    x, pair = linear(4)
    # Channels of one size, then blown up by the first layer and shrunk by the second.
    blown = torch.logspace(-1, 1, 9)[:, None].double()
    even = pair.first / pair.first.abs().amax(1, keepdim=True)
    pair = Pair(even * blown, pair.bias, pair.second / blown.T)
    made = equalize(pair)

    def rounded(w: torch.Tensor) -> torch.Tensor:  # one scale for the whole tensor, 4 bits
        step = w.abs().max() / 7
        return (w / step).round() * step

    def run(p: Pair, change: object) -> torch.Tensor:
        first, second = (change(t) for t in (p.first, p.second))  # type: ignore[operator]
        return F.linear(F.linear(x, first, p.bias).relu(), second)

    wanted = run(pair, lambda w: w)
    before, after = ((run(p, rounded) - wanted).norm() for p in (pair, made))
    assert after < 0.7 * before


def test_dead_channels_and_no_bias() -> None:
    x, pair = linear()
    pair.first[2] = 0
    pair.second[:, 5] = 0
    pair = Pair(pair.first, None, pair.second)
    scale = factors(pair.first, pair.second)
    assert scale[2] == scale[5] == 1
    made = equalize(pair)
    assert made.bias is None
    assert made.first.isfinite().all()
    run = [F.linear(F.linear(x, p.first).relu(), p.second) for p in (pair, made)]
    torch.testing.assert_close(run[0], run[1])
    assert (factors(torch.zeros(3, 2), torch.zeros(2, 3)) == 1).all()
    assert factors(torch.full((1, 1), 1e-30), torch.full((1, 1), 1e30)).isfinite().all()


def test_the_bias_keeps_the_mean_output() -> None:
    g = generator(5)
    x = torch.randn(200, 7, generator=g).double() + torch.arange(7)
    weight = torch.randn(4, 7, generator=g).double()
    quantized = (weight * 2).round() / 2
    for bias in (None, torch.randn(4, generator=g).double()):
        fixed = correct_bias(bias, weight, quantized, x.mean(0))
        after = F.linear(x, quantized, fixed).mean(0)
        torch.testing.assert_close(after, F.linear(x, weight, bias).mean(0))
        assert (F.linear(x, quantized, bias).mean(0) - after).abs().max() > 0.3


@pytest.mark.parametrize("places", [True, False])
def test_the_bias_of_a_convolution(places: bool) -> None:
    g = generator(6)
    x = torch.randn(3, 5, 8, 8, generator=g).double() + torch.arange(5).reshape(5, 1, 1)
    weight = torch.randn(4, 5, 3, 3, generator=g).double()
    quantized = weight.round()
    if places:
        patches = F.unfold(x, 3).transpose(1, 2).reshape(-1, 45)
        mean, near = patches.mean(0).reshape(5, 3, 3), 1e-9
    else:
        mean, near = x.mean((0, 2, 3)), 0.5  # every place the same: the borders count less
    fixed = correct_bias(None, weight, quantized, mean)
    off = F.conv2d(x, quantized, fixed) - F.conv2d(x, weight)
    plain = F.conv2d(x, quantized) - F.conv2d(x, weight)
    assert off.mean((0, 2, 3)).abs().max() < near
    assert plain.mean((0, 2, 3)).abs().max() > 2


def test_equal_weights_and_empty_input_change_nothing() -> None:
    bias = torch.tensor([1.0, -2.0])
    weight = torch.randn(2, 3)
    assert torch.equal(correct_bias(bias, weight, weight, torch.ones(3)), bias)
    assert torch.equal(correct_bias(bias, weight, weight + 1, torch.zeros(3)), bias)


def test_bad_input_is_named() -> None:
    for first, second, groups in [((4, 3), (2, 5), 1), ((4, 3), (2, 4), 2), ((4,), (2, 4), 1),
                                  ((4, 3), (3, 2), 2), ((4, 3), (2, 4), 0)]:  # fmt: skip
        with pytest.raises(InputError, match="weights to equalise"):
            factors(torch.ones(first), torch.ones(second), groups)
    with pytest.raises(InputError, match="NaN"):
        factors(torch.full((2, 2), math.nan), torch.ones(2, 2))
    for bad in (torch.ones(3), torch.tensor([1.0, 0.0]), torch.tensor([1.0, math.inf])):
        with pytest.raises(InputError, match="factors of an equalisation"):
            equalize(Pair(torch.ones(2, 2), None, torch.ones(2, 2)), bad)
    with pytest.raises(InputError, match="quantized weight"):
        correct_bias(None, torch.ones(2, 3), torch.ones(2, 4), torch.ones(3))
    with pytest.raises(InputError, match="mean inputs"):
        correct_bias(None, torch.ones(2, 3), torch.ones(2, 3), torch.ones(4))
    with pytest.raises(InputError, match="mean inputs"):
        correct_bias(torch.ones(3), torch.ones(2, 3), torch.ones(2, 3), torch.ones(3))
    with pytest.raises(InputError, match="NaN"):
        correct_bias(None, torch.ones(1, 2), torch.full((1, 2), math.nan), torch.ones(2))
