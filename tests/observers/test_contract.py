"""Every observer: zero inside, never beyond what was seen, finite whatever comes."""

import math

import pytest
import torch

from penjing import registry
from penjing.histogram import Histogram

NAMES = registry.choices("observers")


def of(values: torch.Tensor) -> Histogram:
    histogram = Histogram()
    histogram.add(values)
    return histogram


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


SAMPLES = {
    "normal": torch.randn(3000, generator=generator()),
    "relu": torch.randn(3000, generator=generator()).relu(),
    "positive": torch.rand(3000, generator=generator()) + 5,
    "negative": -torch.rand(3000, generator=generator()) - 5,
    "outlier": torch.cat([torch.randn(3000, generator=generator()), torch.tensor([1e4])]),
    "one": torch.tensor([0.3]),
    "minus": torch.tensor([-0.3]),
    "constant": torch.full((500,), 2.0),
    "zeros": torch.zeros(500),
    "tiny": torch.full((5,), 1e-42),
    "huge": torch.tensor([-3e38, 3e38]),
    "two": torch.tensor([0.0, 1.0]),
    "nothing": torch.empty(0),
}


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("sample", SAMPLES)
@pytest.mark.parametrize("name", NAMES)
def test_a_range_about_zero_within_what_was_seen(name: str, sample: str, bits: int) -> None:
    histogram = of(SAMPLES[sample])
    before = histogram.counts.clone()
    low, high = registry.lookup("observers", name, "fit")(histogram, bits)
    assert math.isfinite(low)
    assert math.isfinite(high)
    assert min(histogram.low, 0) <= low <= 0 <= high <= max(histogram.high, 0)
    assert (low == high) == (histogram.low == histogram.high == 0)
    assert torch.equal(histogram.counts, before)
    assert registry.lookup("observers", name, "fit")(histogram, bits) == (low, high)


@pytest.mark.parametrize("name", NAMES)
def test_a_range_known_to_be_wider_than_the_counts(name: str) -> None:
    histogram = of(torch.randn(2000, generator=generator()))
    histogram.low, histogram.high = -50.0, 900.0
    low, high = registry.lookup("observers", name, "fit")(histogram, 8)
    assert -50 <= low < -1
    assert 1 < high <= 900
    if name != "minmax":
        assert low > -10
        assert high < 10


@pytest.mark.parametrize("name", NAMES)
def test_a_single_value_is_kept(name: str) -> None:
    for value in (0.3, -7.0, 1e-3):
        ends = registry.lookup("observers", name, "fit")(of(torch.full((9,), value)), 8)
        assert ends == pytest.approx((min(value, 0), max(value, 0)), rel=1e-3)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("factor", [2.0**-20, 2.0**30])
def test_units_do_not_matter(name: str, factor: float) -> None:
    fit = registry.lookup("observers", name, "fit")
    for sample in ("normal", "relu", "outlier"):
        ends = fit(of(SAMPLES[sample]), 8)
        other = fit(of(SAMPLES[sample] * factor), 8)
        assert other == pytest.approx((ends[0] * factor, ends[1] * factor), rel=1e-9)
