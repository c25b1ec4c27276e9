"""Criteria of neurons in whole networks: what goes, what they see, and what they cannot do."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parent.parent))
import networks as net
from penjing.apply import apply
from penjing.errors import InputError, UsageError
from penjing.model import Batch, Model
from penjing.recipe import Recipe
from penjing.registry import choices
from penjing.steps._importance import check
from penjing.steps.shrink import Shrink

CRITERIA = sorted({*choices("unitcriteria"), *choices("criteria")})


def _kept(model: Model, path: str) -> list[int]:
    """Rows of a parameter that stay, from the slices."""
    [found] = [k for e in model.structure for p, d, k in e["slices"] if (p, d) == (path, 0)]
    return found


def pictures() -> list[Batch]:
    generator = torch.Generator().manual_seed(1)
    return [{"x": torch.randn(4, 3, 8, 8, generator=generator)} for _ in range(2)]


@pytest.mark.parametrize("criterion", CRITERIA)
def test_every_criterion_shrinks_heads_and_hidden_units(criterion: str) -> None:
    model, batches = net.bert(2), [net.text_batch(1)]
    if criterion == "bn-scale":
        model, batches = net.resnet(), pictures()[:1]
    small = apply(model, Recipe((Shrink(0.5, criterion=criterion, multiple=2),)), batches).model
    assert small.parameter_count < 0.7 * model.parameter_count
    assert torch.isfinite(small.run(batches[0])).all()
    assert not small.left


def test_channels_without_a_gain_go_first_and_cost_nothing() -> None:
    model, batches = net.resnet(), pictures()
    planted = {"layer1.0": [1, 4, 5, 6], "layer2.1": [0, 2, 3, 9, 10, 12, 13, 15]}
    for path, units in planted.items():
        norm = model.module.get_submodule(path).bn1
        with torch.no_grad():
            norm.weight[units], norm.bias[units] = 0, 0
    targets = tuple(f"{path}.conv2" for path in planted)
    step = Shrink(0.5, criterion="bn-scale", repair=False, multiple=1, targets=targets)
    small = apply(model, Recipe((step,)), batches).model
    for path, units in planted.items():
        kept = _kept(small, f"{path}.conv1.weight")
        assert sorted({*range(len(kept) * 2)} - set(kept)) == units
    torch.testing.assert_close(small.run(batches[0]), model.run(batches[0]))


def test_where_there_is_no_batch_norm_l2_decides_and_it_is_said() -> None:
    class Mixed(net.Basic):
        def __init__(self) -> None:
            super().__init__(8, 8)
            self.conv1, self.bn1 = nn.Conv2d(8, 8, 3, 1, 1), nn.Identity()

    torch.manual_seed(0)
    module = net.ResNet()
    module.layer1 = nn.Sequential(Mixed(), Mixed())
    model = net.wrap(module, "tensor", {"x": torch.randn(2, 3, 8, 8)})
    step = Shrink(0.5, criterion="bn-scale", multiple=1, targets=("layer1.*.conv2",))
    small = apply(model, Recipe((step,)), pictures()).model
    why = "no bn-scale here, units chosen by l2"
    assert small.left == {"layer1.0.conv1": why, "layer1.1.conv1": why}
    norms = module.layer1[0].conv1.weight.detach().flatten(1).norm(dim=1)
    assert _kept(small, "layer1.0.conv1.weight") == norms.argsort()[4:].sort().values.tolist()


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(UsageError, match=r"criterion bn-scale needs batch norms.*gram"):
        apply(net.bert(), Recipe((Shrink(0.5, criterion="bn-scale"),)), [net.text_batch(1)])
    with pytest.raises(UsageError, match=r"allowed: gram, activation, bn-scale, fisher, fpgm, l2,"):
        check("nothing")
    with pytest.raises(UsageError, match="unknown name in criteria; got 3"):
        Shrink(criterion=3)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="no such Python file"):
        Shrink(criterion="/no/file.py:score")


def test_activation_is_the_mean_size_of_what_the_reader_gets() -> None:
    model, batches = net.stack(2), net.arrays(3)
    step = Shrink(0.5, criterion="activation", multiple=1, targets=("blocks.0.down",))
    small = apply(model, Recipe((step,)), batches).model
    block = model.module.blocks[0]
    with torch.no_grad():
        hidden = torch.cat([torch.relu(block.up(model.module.inp(b["x"]))).flatten(0, 1)
                            for b in batches])  # fmt: skip
    wanted = hidden.abs().mean(0).argsort()[12:].sort().values.tolist()
    assert _kept(small, "blocks.0.up.weight") == wanted


@pytest.mark.parametrize("criterion", ["taylor", "fisher"])
def test_slopes_are_of_the_network_before_the_step(criterion: str) -> None:
    """By a backward pass a sample of -<z, output> at gates on the hidden units."""
    model, batches = net.stack(2), net.arrays(2)
    step = Shrink(0.5, criterion=criterion, multiple=1, targets=("blocks.*.down",))
    small = apply(model, Recipe((step,)), batches).model
    generator, module = torch.Generator().manual_seed(0), model.module
    effects = []
    for sample in torch.cat([batch["x"] for batch in batches]):
        gates = [torch.ones(24, requires_grad=True) for _ in range(2)]
        x = module.inp(sample[None])
        for block, gate in zip(module.blocks, gates, strict=True):
            x = x + block.down(gate * torch.relu(block.up(x)))
        output = module.out(x)
        loss = (torch.randn(output.shape, generator=generator) * output).sum()
        effects.append(torch.stack(torch.autograd.grad(loss, gates)))
    found = torch.stack(effects).abs() ** (1 if criterion == "taylor" else 2)  # [n, blocks, units]
    for index, scores in enumerate(found.mean(0)):
        wanted = scores.argsort()[12:].sort().values.tolist()
        assert _kept(small, f"blocks.{index}.up.weight") == wanted


def test_slopes_of_shared_channels_are_at_all_that_reads_them() -> None:
    model, batches = net.resnet(), pictures()
    small = apply(model, Recipe((Shrink(0.5, criterion="taylor", multiple=1),)), batches).model
    twin, generator = net.resnet().module, torch.Generator().manual_seed(0)
    gate = torch.ones(8, requires_grad=True)
    for path in ("layer1.0.conv1", "layer1.1.conv1", "layer2.0.conv1", "layer2.0.down.0"):
        twin.get_submodule(path).register_forward_pre_hook(
            lambda _, args: (args[0] * gate[:, None, None],)
        )
    total = torch.zeros(8)
    for sample in torch.cat([batch["x"] for batch in batches]):
        output = twin(sample[None])
        loss = (torch.randn(output.shape, generator=generator) * output).sum()
        total += torch.autograd.grad(loss, [gate])[0].abs()
    assert _kept(small, "stem.0.weight") == total.argsort()[4:].sort().values.tolist()
