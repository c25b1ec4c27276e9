"""The whole range seen: nothing is clipped."""

from __future__ import annotations

from penjing.histogram import Histogram
from penjing.observers import _ends

__all__ = ["fit"]


def fit(histogram: Histogram, bits: int = 8) -> tuple[float, float]:
    """Lowest and highest value of the grid; zero lies between them."""
    return _ends.whole_range(histogram)
