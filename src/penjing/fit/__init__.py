"""Fit: the whole loop, from a model and a budget to the smallest artifact that passes."""

from penjing.fit.budget import Budget
from penjing.fit.loop import Settings, fit

__all__ = ["Budget", "Settings", "fit"]
