"""Calls that stop before layers, beside the same calls run in one go."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent))
import networks as net
from penjing.calibrate import Stream
from penjing.calls import Call
from penjing.pausing import Paused, paused


def _block() -> tuple[nn.Module, list[nn.Module], list[Call]]:
    model = net.llama()
    stream = Stream(model, [net.text_batch(seed) for seed in range(3)])
    block = model.module.get_submodule(model.blocks[0])
    layers = [block.self_attn.o_proj, block.mlp.gate_proj, block.mlp.down_proj]  # type: ignore[union-attr]
    return block, layers, list(stream.calls())  # type: ignore[return-value]


def _runs(block: nn.Module, calls: list[Call]) -> list[Callable[[], Tensor]]:
    return [partial(call.forward, block, call.hidden) for call in calls]


def test_a_call_that_stops_gives_what_one_in_one_go_gives() -> None:
    block, layers, calls = _block()
    wanted = [call.run(block, call.hidden) for call in calls]
    inputs: list[Tensor] = []
    handle = layers[1].register_forward_pre_hook(lambda _, x: inputs.append(x[0]))
    for call in calls:
        call.run(block, call.hidden)
    handle.remove()
    with paused(layers, _runs(block, calls)) as runs:
        found = [run.until(1) for run in runs]
        outputs = [run.finish() for run in reversed(runs)]
    for got, want in zip([*found, *reversed(outputs)], [*inputs, *wanted], strict=True):
        assert got is not None
        assert torch.equal(got, want)
        assert not got.requires_grad
    assert torch.is_grad_enabled()


def test_a_layer_edited_at_the_stop_before_it_is_run_as_edited() -> None:
    """Its weight, and a hook on its input that was not there when the call came to it."""
    block, layers, calls = _block()
    down = layers[2]
    with paused(layers, _runs(block, calls)) as runs:
        for run in runs:
            run.until(2)
        with torch.no_grad():
            down.weight.mul_(0.5)  # type: ignore[operator]
        handle = down.register_forward_pre_hook(lambda _, x: (x[0] + 1,))
        outputs = [run.finish() for run in runs]
    for call, output in zip(calls, outputs, strict=True):
        assert torch.equal(call.run(block, call.hidden), output)
    handle.remove()
    assert not torch.equal(calls[0].run(block, calls[0].hidden), outputs[0])


def test_a_layer_that_a_call_does_not_reach_has_no_input() -> None:
    class Branch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(2, 2), nn.Linear(2, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.second(self.first(x) if len(x) > 1 else x)

    block = Branch()
    calls = [Call(torch.ones(n, 2), (), {}, named=False) for n in (1, 2)]
    with paused([block.first, block.second], _runs(block, calls)) as runs:
        assert runs[0].until(0) is None
        assert runs[1].until(0) is calls[1].hidden
        assert runs[0].until(1) is calls[0].hidden
        for run, call in zip(runs, calls, strict=True):
            assert torch.equal(run.finish(), block(call.hidden))


def test_a_call_given_up_leaves_nothing_and_an_error_is_the_callers() -> None:
    block, layers, calls = _block()
    with pytest.raises(KeyError), paused(layers, _runs(block, calls)) as runs:  # noqa: PT012
        runs[0].until(1)
        raise KeyError
    assert not any(layer._forward_pre_hooks for layer in layers)
    layers[1].register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError), paused(layers, _runs(block, calls)) as runs:
        runs[0].finish()
    # A run that nobody stops runs past the hooks.
    alone = Paused(_runs(block, calls)[0])
    with pytest.raises(ZeroDivisionError):
        alone.finish()
