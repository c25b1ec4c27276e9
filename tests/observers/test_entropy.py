import numpy as np
import pytest
import scipy.stats
import torch

from penjing.histogram import Histogram
from penjing.observers import entropy


def of(values: torch.Tensor) -> Histogram:
    histogram = Histogram()
    histogram.add(values)
    return histogram


def kl(histogram: Histogram, low: float, high: float, bits: int) -> float:
    """Bin by bin, with scipy's divergence."""
    counts, width = histogram.counts.numpy().astype(float), histogram.width
    scale = (high - low) / (2**bits - 1)
    lower = (np.arange(len(counts)) - len(counts) // 2) * width
    own = [i for i, edge in enumerate(lower) if edge + width > low and edge <= high]
    p = counts[own]
    p[0] += counts[: own[0]].sum()
    p[-1] += counts[own[-1] + 1 :].sum()
    steps: dict[int, list[int]] = {}
    for place, i in enumerate(own):
        step = int(np.clip(np.round((lower[i] + width / 2 - low) / scale), 0, 2**bits - 1))
        steps.setdefault(step, []).append(place)
    q = np.zeros(len(own))
    for places in steps.values():
        held = [place for place in places if p[place] > 0]
        if held:
            q[held] = sum(counts[own[place]] for place in places) / len(held)
    q = np.maximum(q / q.sum(), 1e-12)
    # scipy would normalise again
    return float(scipy.stats.entropy(p, q) - np.log(q.sum()))


SAMPLES = {
    "normal": torch.randn(20_000, generator=torch.Generator().manual_seed(0)),
    "relu": torch.randn(20_000, generator=torch.Generator().manual_seed(1)).relu(),
    "cubed": torch.randn(20_000, generator=torch.Generator().manual_seed(2)) ** 3,
    "on the edge": torch.tensor([-1.0] * 50 + [1.0] * 50 + [0.3] * 100),
}


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("factors", [(1.0, 1.0), (0.7, 0.7), (0.3, 0.5), (0.1, 0.9)])
@pytest.mark.parametrize("name", SAMPLES)
def test_scipys_divergence(name: str, factors: tuple[float, float], bits: int) -> None:
    histogram = of(SAMPLES[name])
    ends = min(histogram.low, 0) * factors[0], max(histogram.high, 0) * factors[1]
    found = entropy.divergence(histogram, ends, bits)
    assert found == pytest.approx(kl(histogram, *ends, bits), rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("bits", [3, 8])
@pytest.mark.parametrize("name", SAMPLES)
def test_no_range_of_a_lattice_is_much_better(name: str, bits: int) -> None:
    histogram = of(SAMPLES[name])
    low, high = entropy.fit(histogram, bits)
    least = entropy.divergence(histogram, (low, high), bits)
    for a in np.linspace(0.1, 1, 10):
        for b in np.linspace(0.1, 1, 10):
            ends = min(histogram.low, 0) * a, max(histogram.high, 0) * b
            assert least <= entropy.divergence(histogram, ends, bits) + 0.002


def test_values_that_fit_the_grid_are_not_clipped() -> None:
    # One value a step and both ends on bin borders: the whole range loses nothing.
    values = torch.arange(-128, 128).float() / 128
    histogram = of(values.repeat(3))
    whole = (histogram.low, histogram.high)
    assert entropy.divergence(histogram, whole, 8) == pytest.approx(0, abs=1e-12)
    assert entropy.fit(histogram, 8) == whole


def test_few_bins_are_no_distribution() -> None:
    histogram = of(SAMPLES["relu"])
    assert entropy.divergence(histogram, (0.0, histogram.width), 8) == float("inf")
    assert entropy.divergence(histogram, (0.0, 0.0), 8) == float("inf")


def test_a_far_outlier_is_cut() -> None:
    values = torch.cat([SAMPLES["normal"], torch.tensor([30.0])])
    low, high = entropy.fit(of(values), 4)
    assert high < 10
    assert low < -1.5
