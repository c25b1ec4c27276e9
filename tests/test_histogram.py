import math

import numpy as np
import pytest
import torch

from penjing.errors import InputError
from penjing.histogram import HALF, Histogram


def of(*parts: object) -> Histogram:
    histogram = Histogram()
    for part in parts:
        histogram.add(torch.as_tensor(part))
    return histogram


def test_bins_by_hand() -> None:
    histogram = of([0.75, -0.5, 0.0, 0.0])  # reach 1, width 1 / HALF
    assert (histogram.reach, histogram.width) == (1.0, 1 / HALF)
    filled = {int(i): int(histogram.counts[i]) for i in histogram.counts.nonzero()}
    assert filled == {HALF + HALF * 3 // 4: 1, HALF - HALF // 2: 1, HALF: 2}
    assert (histogram.low, histogram.high) == (-0.5, 0.75)


def test_merging_by_hand() -> None:
    # Reach 1, then 4: four bins become one. 1 and 3 widths above zero meet, -1 stays below.
    width = 1 / HALF
    histogram = of([0.5, 1.5 * width, 3.5 * width, 4.5 * width, -0.5 * width], [3.0])
    assert histogram.reach == 4.0
    filled = {int(i) - HALF: int(histogram.counts[i]) for i in histogram.counts.nonzero()}
    assert filled == {HALF // 8: 1, 0: 2, 1: 1, -1: 1, HALF * 3 // 4: 1}


def test_numpy_counts_the_same() -> None:
    values = torch.randn(5000, generator=torch.Generator().manual_seed(0)).double() * 3
    histogram = of(values)
    edges = np.linspace(-histogram.reach, histogram.reach, 2 * HALF + 1)
    counts, _ = np.histogram(values.numpy(), edges)
    np.testing.assert_array_equal(histogram.counts.numpy(), counts)
    np.testing.assert_allclose(histogram.centres.numpy(), (edges[1:] + edges[:-1]) / 2)


@pytest.mark.parametrize("seed", range(4))
def test_the_way_the_data_came_in_does_not_matter(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(4000, generator=generator) * torch.logspace(-6, 3, 4000)
    whole = of(values)
    mixed = values[torch.randperm(4000, generator=generator)]
    for parts in (values.split(7), values.flip(0).split(513), mixed.split(100)):
        histogram = of(*parts)
        assert torch.equal(histogram.counts, whole.counts)
        assert (histogram.reach, histogram.low, histogram.high) == (
            whole.reach, whole.low, whole.high,
        )  # fmt: skip
    assert int(whole.counts.sum()) == 4000


@pytest.mark.parametrize("value", [1.0, 2.0**-70, 2.0**127, math.nextafter(2.0, 0), 0.0, -8.0])
def test_a_value_lies_in_its_own_bin(value: float) -> None:
    histogram = of(torch.tensor([value], dtype=torch.float64))
    [place] = histogram.counts.nonzero().flatten().tolist()
    low = float(histogram.centres[place]) - histogram.width / 2
    assert low <= value < low + histogram.width
    assert abs(value) < histogram.reach


def test_nothing_added() -> None:
    histogram = of(torch.empty(0, 3))
    assert (histogram.low, histogram.high, histogram.reach) == (0.0, 0.0, 0.0)
    assert not histogram.counts.any()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 1.7e308])
def test_values_that_are_not_finite_are_refused(bad: float) -> None:
    histogram = of([1.0])
    with pytest.raises(InputError, match="NaN or infinite"):
        histogram.add(torch.tensor([0.0, bad, 1.0], dtype=torch.float64))
    assert int(histogram.counts.sum()) == 1


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16, torch.int64])
def test_other_types(kind: torch.dtype) -> None:
    values = torch.tensor([-3, 0, 5])
    assert torch.equal(of(values.to(kind)).counts, of(values.double()).counts)
