"""Tune: the options of a recipe's steps, searched; Optuna proposes, penjing makes and measures."""

from penjing.tune.outcome import Tuned
from penjing.tune.quest import Cost
from penjing.tune.verb import tune

__all__ = ["Cost", "Tuned", "tune"]
