import numpy as np
import pytest
import torch

from penjing.errors import UsageError
from penjing.histogram import Histogram
from penjing.observers import percentile


def of(values: torch.Tensor) -> Histogram:
    histogram = Histogram()
    histogram.add(values)
    return histogram


@pytest.mark.parametrize("quantile", [0.9, 0.99, 0.999, 0.9999])
def test_numpys_quantiles(quantile: float) -> None:
    values = torch.randn(200_000, generator=torch.Generator().manual_seed(0))
    histogram = of(values)
    low, high = percentile.fit(histogram, quantile=quantile)
    wanted = np.quantile(values.double().numpy(), [1 - quantile, quantile], method="hazen")
    np.testing.assert_allclose([low, high], wanted, atol=2 * histogram.width)
    # To the count: no more than the share lies outside.
    for outside in ((values > high).sum(), (values < low).sum()):
        assert abs(int(outside) - (1 - quantile) * 200_000) <= int(histogram.counts.max())


def test_one_bin_is_divided_by_hand() -> None:
    # 1000 values in the bin of 1.0, width 2 / 4096: high is 0.9 of it above its low edge.
    histogram = of(torch.full((1000,), 1.0))
    histogram.high = 2.0
    _, high = percentile.fit(histogram, quantile=0.9)
    assert high == pytest.approx(1 + 0.9 * histogram.width, rel=1e-12)


def test_the_whole_is_the_whole_range() -> None:
    histogram = of(torch.tensor([-1.5, 0.0, 0.25, 3.0]))
    low, high = percentile.fit(histogram, quantile=1.0)
    assert (low, high) == (-1.5, 3.0)


def test_one_outlier_in_a_hundred_thousand_is_cut() -> None:
    values = torch.rand(100_000, generator=torch.Generator().manual_seed(0))
    values[7] = 1e3
    _, high = percentile.fit(of(values))
    assert 0.99 < high < 1.5


@pytest.mark.parametrize("quantile", [0.0, 0.5, 1.01, float("nan")])
def test_a_quantile_without_a_range_is_refused(quantile: float) -> None:
    with pytest.raises(UsageError, match="quantile"):
        percentile.fit(of(torch.ones(3)), quantile=quantile)
