"""The verb on a network of one layer with a cost of the recipe alone, for processes to be killed.

A file of its own: those processes import it.
"""

from __future__ import annotations

import math
import os
import signal
import sys
import time
from dataclasses import dataclass
from multiprocessing.synchronize import Barrier
from pathlib import Path

import torch
from torch import nn

import penjing
from penjing.errors import PenjingError, UsageError
from penjing.model import Model, Source
from penjing.recipe import Recipe
from penjing.steps.prune import Prune
from penjing.steps.quantize import Quantize

RECIPE = Recipe((Prune(0.5, "magnitude"), Quantize(8, method="rtn")))
SEARCH = ["prune.sparsity=0.05..0.9", "quantize.bits=2..8:int", "quantize.group=0|8|16"]


def cost(recipe: Recipe) -> float:
    """Least, 0, at 70 %, 5 bits and groups of 8; two bits in whole rows are refused."""
    prune, quantize = recipe.steps
    if quantize.bits == 2 and not quantize.group:
        raise UsageError("two bits in whole rows")
    return abs(math.log(prune.sparsity / 0.7)) + abs(quantize.bits - 5) / 6 + (quantize.group != 8)


def late(recipe: Recipe) -> float:
    """The same, of which some take longer than others that begin after them."""
    time.sleep(0.05 * (recipe.steps[1].bits % 3))
    return cost(recipe)


def nothing(recipe: Recipe) -> float:
    """At no cost."""
    return recipe.steps[0].sparsity


@dataclass(frozen=True)
class Deadly:
    """The same; two trials, found by their bits, end their process the first time."""

    folder: Path

    def __call__(self, recipe: Recipe) -> float:
        mark = self.folder / f"died-{recipe.steps[1].bits}"
        if recipe.steps[1].bits in (3, 5) and not mark.exists():
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return late(recipe)


def network() -> Model:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(16, 16))
    return Model(module, "tensor", {"x": torch.zeros(1, 16)}, Source("test", "net", "0"))


def run(folder: Path, trials: int, storage: str | None = None, pause: float = 0.0) -> None:
    """One process of a search; what a kill leaves, the next one goes on from."""

    def slowly(recipe: Recipe) -> float:
        time.sleep(pause)
        return cost(recipe)

    penjing.tune(
        network(), RECIPE, SEARCH, folder / "out", objective=slowly if pause else cost,
        trials=trials, seed=3, storage=storage,
        journal=None if storage else folder / "journal",
    )  # fmt: skip


def race(folder: Path, number: int, barrier: Barrier, storage: str | None, cache: str) -> None:
    """One of several that start at once; an error is written into a file."""
    os.environ["PENJING_CACHE"] = cache
    barrier.wait()
    try:
        run(folder, 12, storage, pause=0.1)
    except PenjingError as error:
        (folder / f"said-{number}").write_text(f"{os.getpid()} {error}")
        sys.exit(error.exit_status)
    (folder / f"done-{number}").write_text(str(os.getpid()))


def run_with(folder: Path, trials: int, workers: int) -> None:
    """A search with workers, to be killed."""
    penjing.tune(
        network(), RECIPE, SEARCH, folder / "out", objective=late, trials=trials, seed=3,
        journal=folder / "journal", workers=workers,
    )  # fmt: skip
