"""Shares of a network: the fraction of the units that takes them, checked on the real thing."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
import networks as net
from penjing.apply import apply
from penjing.errors import InputError, UsageError
from penjing.inspect import inspect
from penjing.model import Model
from penjing.recipe import Recipe
from penjing.sizing import ratio_for
from penjing.steps.shrink import Shrink


def _cost(model: Model, of: str) -> float:
    found = inspect(model, latency=False).totals
    return float((found.parameters if of == "parameters" else found.macs) or 0)


@pytest.mark.parametrize("of", ["parameters", "macs"])
def test_the_share_is_met_and_hardly_more(of: str) -> None:
    model = net.resnet()
    step = Shrink(0.5, multiple=1)
    ratio = ratio_for(model, step, of, 0.4)
    assert ratio < 0.4  # rows and columns both go
    small = apply(model, Recipe((Shrink(ratio, multiple=1),)), [model.example]).model
    left = _cost(small, of) / _cost(model, of)
    assert left <= 0.6
    assert left > 0.6 - 0.12  # widths of this network are eight and less
    assert torch.isfinite(small.run(model.example)).all()


def test_more_than_there_is_and_what_is_not_there() -> None:
    model = net.bert()
    with pytest.raises(InputError, match="cannot take 99%"):
        ratio_for(model, Shrink(0.5), "parameters", 0.99)
    with pytest.raises(UsageError, match="latency"):
        ratio_for(model, Shrink(0.5), "latency", 0.5)
