"""Cost: what is counted of gates is what the smaller network has."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import networks as net
from penjing.channelmap import channel_map
from penjing.coupling import remove
from penjing.errors import UsageError
from penjing.inspect import inspect
from penjing.model import Model
from penjing.steps._cost import Cost

MAKES: list[Callable[[], Model]] = [net.bert, net.llama, net.vit, net.resnet]


def _smaller(model: Model, cost: Cost, kept: torch.Tensor) -> Model:
    twin, plans, settings = model.copy(), [], []
    for free, own in zip(channel_map(model).free, cost.slices, strict=True):
        stays = kept[own].nonzero().flatten().tolist()
        if len(stays) < free.group.count:
            plans.append((free.group, stays))
            settings += free.settings(len(stays))
    remove(twin.module, plans, settings)
    return twin


def _drawn(model: Model, cost: Cost, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    kept = torch.rand(cost.slices[-1].stop, generator=generator) < 0.6
    for own in cost.slices:
        kept[own.start] = True  # one of each stays
    return kept


@pytest.mark.parametrize("make", MAKES)
def test_parameters_are_those_of_the_smaller_network(make: Callable[[], Model]) -> None:
    model = make()
    cost = Cost(model, channel_map(model).free, "parameters")
    for seed in range(3):
        kept = _drawn(model, cost, seed)
        wanted = _smaller(model, cost, kept).parameter_count / model.parameter_count
        assert float(cost.left(kept.double())) == pytest.approx(wanted, rel=1e-9)
        assert cost.real(kept) == pytest.approx(wanted, rel=1e-9)
    assert float(cost.left(torch.ones(len(kept), dtype=torch.float64))) == 1


@pytest.mark.parametrize("make", MAKES)
def test_multiplications_are_counted_by_running_and_foreseen(make: Callable[[], Model]) -> None:
    model = make()
    cost = Cost(model, channel_map(model).free, "macs")
    whole = inspect(model, latency=False).totals.macs
    kept = _drawn(model, cost, 0)
    small = inspect(_smaller(model, cost, kept), latency=False).totals.macs
    assert whole is not None
    assert small is not None
    assert cost.real(kept) == pytest.approx(small / whole, rel=1e-9)
    assert float(cost.left(kept.double())) == pytest.approx(small / whole, rel=0.02)


def test_units_are_the_inputs_of_what_reads_them() -> None:
    model = net.bert(1)  # 4 heads of 8 channels, 48 hidden units
    free = channel_map(model).free
    cost = Cost(model, free, "units")
    kept = torch.ones(cost.slices[-1].stop, dtype=torch.bool)
    heads = next(own for f, own in zip(free, cost.slices, strict=True) if f.group.is_heads)
    kept[heads.start] = False
    assert cost.real(kept) == pytest.approx(1 - 8 / 80)


def test_the_slope_is_that_of_small_differences() -> None:
    model = net.llama(1)
    cost = Cost(model, channel_map(model).free, "parameters")
    counts = torch.rand(cost.slices[-1].stop, dtype=torch.float64, generator=torch.manual_seed(0))
    assert torch.autograd.gradcheck(cost.left, (counts.requires_grad_(),))


def test_an_unknown_measure() -> None:
    model = net.bert(1)
    with pytest.raises(UsageError, match="unknown measure; got latency; allowed: units"):
        Cost(model, channel_map(model).free, "latency")
