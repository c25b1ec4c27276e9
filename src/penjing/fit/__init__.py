"""Fit: the whole loop, from a model and a budget to the smallest artifact that passes."""

from penjing.fit.budget import Budget
from penjing.fit.loop import fit
from penjing.fit.search import Settings

__all__ = ["Budget", "Settings", "fit"]
