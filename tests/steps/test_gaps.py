"""What stands in for blocks: least squares by hand, the same after saving and in onnxruntime."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent.parent))
import networks as net
from penjing.apply import Applied, apply
from penjing.edits import perform
from penjing.model import Model
from penjing.recipe import Edit, Patch, Recipe
from penjing.runtimes import onnxruntime as runtime
from penjing.steps._gaps import fit_map, low_rank
from penjing.steps.cut import Cut
from penjing.storededits import pack, unpack
from penjing.writers import onnx as writer

TEXTS = [net.text_batch(seed, samples=8) for seed in range(8)]


def _cut(model: Model, batches: list[net.Batch], *blocks: int, **options: object) -> Applied:
    step = Cut(blocks=tuple(model.blocks[b] for b in blocks), **options)  # type: ignore[arg-type]
    return apply(model, Recipe((step,)), batches)


def _off(model: Model, small: Model, batch: net.Batch) -> float:
    with torch.no_grad():
        return float((small.run(batch) - model.run(batch)).norm())


def test_a_refitted_layer_is_a_ridge_toward_its_old_weights() -> None:
    model, batches = net.stack(4), net.arrays(8)
    done = _cut(model, batches, 1, patch="none", refit=True)
    assert [d.path for d in done.done if d.kind == "weight"] == [
        f"blocks.{i}.down.{n}" for i in (2, 3) for n in ("weight", "bias")
    ]
    # The first of them: what reaches it is the whole network's state in front of the gap.
    blocks = model.module.blocks
    x, goal = [], []
    with torch.no_grad():
        for batch in batches:
            h = blocks[0](model.module.inp(batch["x"]))
            whole = blocks[2](blocks[1](h))
            x.append(torch.relu(blocks[2].up(h)).flatten(0, 1))
            goal.append((whole - h).flatten(0, 1))
    a, b = (torch.cat(t).double().numpy() for t in (x, goal))
    mean_a, mean_b = a.mean(0), b.mean(0)
    a, b, old = a - mean_a, b - mean_b, blocks[2].down.weight.detach().double().numpy()
    hold = np.sqrt(0.03 * (a**2).mean() * len(a))
    rows = np.vstack([a, hold * np.eye(a.shape[1])])
    weight = np.linalg.lstsq(rows, np.vstack([b, hold * old.T]), rcond=None)[0].T
    found = done.model.module.blocks[1].down
    np.testing.assert_allclose(found.weight.detach(), weight, atol=2e-3)
    np.testing.assert_allclose(found.bias.detach(), mean_b - weight @ mean_a, atol=2e-3)


@pytest.mark.parametrize("make", [net.bert, net.llama, net.stack])
def test_refitted_networks_are_nearer_on_data_not_seen(make: Any) -> None:
    model = make(5)
    batches = net.arrays(8) if make is net.stack else TEXTS
    plain = _off(model, _cut(model, batches[:-1], 2, patch="none").model, batches[-1])
    for options in ({"patch": "none"}, {"patch": "linear"}, {"patch": "fused"}):
        small = _cut(model, batches[:-1], 2, refit=True, **options).model
        assert _off(model, small, batches[-1]) < plain


def test_a_fused_patch_leaves_nothing_behind() -> None:
    model, batches = net.stack(5), net.arrays(8)
    done = _cut(model, batches, 2, 3, patch="fused")
    assert not any("penjing" in n for n, _ in done.model.module.named_modules())
    paths = [d.path for d in done.done if d.kind == "weight"]
    assert paths[:2] == ["blocks.1.down.weight", "blocks.1.down.bias"]
    plain = _cut(model, batches, 2, 3, patch="none").model
    assert done.model.parameter_count == plain.parameter_count
    assert _off(model, done.model, batches[0]) < 0.7 * _off(model, plain, batches[0])


def test_low_rank_is_the_best_of_its_rank() -> None:
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(12, 12, generator=generator)
    x = torch.randn(400, 12, generator=generator) @ mix + 3
    weight = torch.eye(12) + torch.randn(12, 12, generator=generator)
    up, inner = low_rank(weight, [x[:100], x[100:]], 4)
    centred = (x - x.mean(0)).double()
    goal = centred @ (weight.double() - torch.eye(12)).T
    # Of what is linear in x the nearest of rank 4 is by its singular values (Eckart and Young).
    sizes = torch.linalg.svdvals(goal)
    off = (centred @ (up.double() @ inner.double()).T - goal).norm()
    assert float(off) == pytest.approx(float(sizes[4:].norm()), rel=1e-3)
    up, inner = low_rank(weight, [x], 12)
    torch.testing.assert_close(torch.eye(12) + up @ inner, weight, rtol=1e-3, atol=1e-3)


def test_low_rank_patches_are_smaller_and_help() -> None:
    model, batches = net.bert(4), TEXTS
    full, small, none = (
        _cut(model, batches, 1, patch=patch) for patch in ("linear", "low-rank", "none")
    )
    counts = [a.model.parameter_count for a in (none, small, full)]
    assert counts[1] - counts[0] == 32 * 4 * 2 + 32
    assert counts[0] < counts[1] < counts[2]
    # Outside the patch they are the same network.
    patch = small.model.module.get_submodule(small.model.blocks[1]).penjing_before
    whole = full.model.module.get_submodule(full.model.blocks[1]).penjing_before
    assert patch.inner.weight.shape == (4, 32)
    torch.testing.assert_close(patch.up.bias, whole.bias)


def test_a_map_that_does_not_help_is_refused() -> None:
    generator = torch.Generator().manual_seed(0)

    def noise() -> Tensor:
        return torch.randn(50, 30, generator=generator)

    rows = [(x := noise(), x + noise(), x) for _ in range(4)]
    assert fit_map(rows, torch.eye(30), 1e-6) is None
    assert fit_map([(x, x + 1, x) for x, _, _ in rows], torch.eye(30), 1e-6) is not None


def test_attention_sinks_come_through_as_they_are() -> None:
    generator = torch.Generator().manual_seed(0)
    mix = torch.eye(16) + 0.2 * torch.randn(16, 16, generator=generator)
    direction = torch.nn.functional.normalize(torch.randn(16, generator=generator), dim=0)
    rows = []
    for _ in range(8):
        x = torch.randn(4000, 16, generator=generator)
        y = x @ mix.T
        x[0] = y[0] = 1e4 * direction
        rows.append((x, y, x))
    fit = fit_map(rows, torch.eye(16), 1e-6, bias=False)
    assert fit is not None
    sink = 1e4 * direction
    assert float((fit.weight @ sink - sink).norm()) < 1e-4 * 1e4
    # Across their direction it is the map of all others.
    across = torch.eye(16) - torch.outer(direction, direction)
    torch.testing.assert_close(fit.weight @ across, mix @ across, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("ranks", [(None, 2), (2, None), (2, 2), (None, None)])
@pytest.mark.parametrize("position", ["before", "after"])
def test_two_patches_at_one_place_are_one(ranks: tuple[Any, Any], position: Any) -> None:
    model = net.stack(3)
    generator = torch.Generator().manual_seed(0)
    patches = []
    for rank in ranks:
        inner = None if rank is None else torch.randn(rank, 8, generator=generator)
        weight = torch.randn(8, rank or 8, generator=generator)
        patches.append(Patch(weight, torch.randn(8, generator=generator), position, inner))
    for patch in patches:
        perform(model, Edit("patch", "blocks.1", patch, "test"))
    with torch.no_grad():
        h = model.module.blocks[0](model.module.inp(model.example["x"]))
        first, second = patches if position == "after" else patches[::-1]
        if position == "before":
            h = model.module.blocks[1].forward(second(first(h)))
        else:
            h = second(first(model.module.blocks[1].forward(h)))
        wanted = model.module.out(model.module.blocks[2](h))
        torch.testing.assert_close(model.run(model.example), wanted, rtol=1e-4, atol=1e-4)


def test_edits_in_a_journal() -> None:
    model = net.llama(4)
    edits = [Edit("patch", model.blocks[1], Patch(torch.randn(32, 4), torch.randn(32), "before",
                                                  torch.randn(4, 32)), "why")]  # fmt: skip
    (found,) = unpack(*pack(edits))
    assert isinstance(found.value, Patch)
    assert found.value.inner is not None
    x = torch.randn(3, 32)
    assert torch.equal(found.value(x), edits[0].value(x))  # type: ignore[operator, misc]


@pytest.mark.parametrize(
    "options",
    [{"patch": "linear"}, {"patch": "low-rank", "refit": True}, {"patch": "fused"},
     {"part": "attention"}, {"part": "mlp"}],
)  # fmt: skip
def test_a_cut_decoder_writes_in_onnxruntime_with_its_cache(
    options: dict[str, Any], tmp_path: Path
) -> None:
    small = _cut(net.llama(4), TEXTS, 0, 2, **options).model
    writer.write(small, tmp_path / "model.onnx")
    session = runtime.open(tmp_path / "model.onnx", threads=1)
    layers = sum(hasattr(m, "layer_idx") for m in small.module.modules())
    assert len(session.cache) == 2 * layers == (8 if options.get("part") == "mlp" else 4)
    ids = torch.tensor([[5, 9, 20]])
    with torch.no_grad():
        written = small.module.generate(
            ids, max_new_tokens=6, do_sample=False, pad_token_id=0, eos_token_id=-1
        )
    given, past, made = ids.numpy(), None, ids[0].tolist()
    for _ in range(6):
        mask = np.ones((1, len(made)), np.int64)
        logits, past = session.step({"input_ids": given, "attention_mask": mask}, past)
        made.append(int(logits[0, -1].argmax()))
        given = np.array([[made[-1]]])
    assert made == written[0].tolist()


def test_a_merged_block_is_between_the_two_it_stands_for() -> None:
    model, batches = net.stack(4), net.arrays(8)
    with torch.no_grad():  # both are small steps, and the second of the two is the larger one
        one, two = model.module.blocks[1], model.module.blocks[2]
        two.load_state_dict(one.state_dict())
        two.down.weight.mul_(2.0)
        two.down.bias.mul_(2.0)
    done = _cut(model, batches, 2, patch="merged")
    plain = _cut(model, batches, 2, patch="none").model
    assert {d.path for d in done.done if d.kind == "weight"} == {
        f"blocks.1.{layer}.{kind}" for layer in ("up", "down") for kind in ("weight", "bias")
    }
    share = float(next(d.why for d in done.done if d.kind == "weight").split("%")[0].split()[1])
    assert share == 100  # x + f(x) + 2 f(x), as far as x stays the same
    merged = done.model.module.blocks[1]
    torch.testing.assert_close(merged.down.weight, 2 * one.down.weight)
    torch.testing.assert_close(merged.up.weight, one.up.weight)
    assert done.model.parameter_count == plain.parameter_count
    assert _off(model, done.model, batches[-1]) < _off(model, plain, batches[-1])


def test_a_merged_block_that_does_not_help_stays_as_it_was() -> None:
    model, batches = net.stack(4), net.arrays(8)
    with torch.no_grad():
        model.module.blocks[2].scale = 0.0  # it does nothing, so there is nothing to take on
        for parameter in model.module.blocks[2].parameters():
            parameter.normal_()
    done = _cut(model, batches, 2, patch="merged")
    assert {d.kind for d in done.done} == {"drop"}
    assert net.same(done.model, _cut(model, batches, 2, patch="none").model)


class _Stages(torch.nn.Module):
    """Two lists of blocks, and a layer between them that makes the hidden state wider."""

    def __init__(self) -> None:
        super().__init__()
        self.inp, self.mid, self.out = (torch.nn.Linear(*n) for n in ((6, 8), (8, 12), (12, 4)))
        self.a = torch.nn.ModuleList(net.MlpBlock(8, 24) for _ in range(2))
        self.b = torch.nn.ModuleList(net.MlpBlock(12, 24) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.inp(x)
        for block in self.a:
            x = block(x)
        x = self.mid(x)
        for block in self.b:
            x = block(x)
        return self.out(x)


@pytest.mark.parametrize("criterion", ["by name", "greedy"])
def test_a_gap_ends_where_a_list_of_blocks_ends(criterion: str) -> None:
    torch.manual_seed(0)
    model, batches = net.wrap(_Stages(), "tensor", {"x": torch.randn(2, 5, 6)}), net.arrays(8)
    assert model.blocks == ("a.0", "a.1", "b.0", "b.1")
    if criterion == "greedy":  # one of each list stays
        step = Cut(2, criterion="greedy", refit=True)
        gone = [d.path for d in apply(model, Recipe((step,)), batches).done if d.kind == "drop"]
        assert sorted(path[0] for path in gone) == ["a", "b"]
        return
    done = _cut(model, batches, 1, 2)
    small, x = done.model.module, batches[0]["x"]
    assert {d.path for d in done.done if d.kind == "patch"} == {"a.0", "b.1"}
    with torch.no_grad():
        h = small.mid(small.a[0].penjing_after(model.module.a[0](model.module.inp(x))))
        h = small.b[0].penjing_before(h)
        torch.testing.assert_close(done.model.run(batches[0]), small.out(model.module.b[1](h)))
    assert _off(model, done.model, batches[0]) < _off(
        model, _cut(model, batches, 1, 2, patch="none").model, batches[0]
    )
