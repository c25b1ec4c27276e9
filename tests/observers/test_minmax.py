import torch

from penjing.histogram import Histogram
from penjing.observers import minmax


def test_the_whole_range_with_zero() -> None:
    for values, wanted in [([-2.0, 7.0], (-2.0, 7.0)), ([3.0, 4.0], (0.0, 4.0)),
                           ([-3.0, -1.0], (-3.0, 0.0))]:  # fmt: skip
        histogram = Histogram()
        histogram.add(torch.tensor(values))
        assert minmax.fit(histogram) == wanted
