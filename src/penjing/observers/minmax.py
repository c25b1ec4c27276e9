"""The whole range seen: nothing is clipped."""

from __future__ import annotations

from penjing.histogram import Histogram

__all__ = ["fit"]


def fit(histogram: Histogram, bits: int = 8) -> tuple[float, float]:
    """Lowest and highest value of the grid; zero lies between them."""
    return min(histogram.low, 0.0), max(histogram.high, 0.0)
