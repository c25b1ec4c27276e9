"""Detours: blocks left out for a while are as if they were not there, and then all is as before."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
import networks as net
from penjing.detour import Detours, Passed


@pytest.mark.parametrize("make", [net.bert, net.llama, net.vit])
def test_a_block_left_out_is_a_network_without_it(make) -> None:  # type: ignore[no-untyped-def]
    model = make(4)
    before = model.run(model.example)
    detours = Detours(model, model.example)
    found = detours.run(model.example, {1: None, 2: None})
    small = model.copy()
    holder = small.module.get_submodule(small.blocks[0].rpartition(".")[0])
    del holder[2], holder[1]
    for config in (getattr(small.module, "config", None),):
        config.num_hidden_layers = 2  # type: ignore[union-attr]
    torch.testing.assert_close(found, small.run(model.example))
    assert torch.equal(model.run(model.example), before)


def test_what_stands_in_and_what_passed() -> None:
    model = net.stack(3)
    passed = Passed()
    found = Detours(model, model.example).run(model.example, {1: lambda h: 2 * h + 1}, passed)
    with torch.no_grad():
        first = model.module.blocks[0](model.module.inp(model.example["x"]))
        last = model.module.blocks[2](2 * first + 1)
        torch.testing.assert_close(found, model.module.out(last))
    torch.testing.assert_close(passed.entered[1], first)
    torch.testing.assert_close(passed.left[1], 2 * first + 1)
    torch.testing.assert_close(passed.left[2], last)


def test_layers_that_give_zeros() -> None:
    model = net.stack(3)
    found = Detours(model, model.example).run(model.example, {}, without=["blocks.1.down"])
    without = Detours(model, model.example).run(model.example, {1: None})
    torch.testing.assert_close(found, without)  # its blocks add what `down` gives


def test_an_error_leaves_the_network_as_it_was() -> None:
    model = net.stack(3)
    before = model.run(model.example)

    def fails(_: torch.Tensor) -> torch.Tensor:
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        Detours(model, model.example).run(model.example, {1: fails})
    assert torch.equal(model.run(model.example), before)
    assert "forward" not in vars(model.module.blocks[1])
