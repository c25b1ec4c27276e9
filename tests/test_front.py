"""The front: found where the edits say, and training without running it is training with it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
import networks as net
from penjing.apply import apply
from penjing.front import Front, front_of
from penjing.model import Batch, Model
from penjing.objective import Objective
from penjing.recipe import Recipe
from penjing.steps.cut import Cut
from penjing.steps.prune import Prune
from penjing.steps.recover import Recover

MAKE = {"bert": net.bert, "llama": net.llama, "vit": net.vit}


def samples(kind: str) -> list[Batch]:
    if kind == "vit":
        draw = torch.Generator().manual_seed(0)
        return [{"pixel_values": torch.randn(4, 3, 16, 16, generator=draw)} for _ in range(6)]
    return [net.text_batch(n) for n in range(6)]


def cut(kind: str, gone: int = 2, patch: str = "linear") -> tuple[Model, Model, list[Batch]]:
    """Of five blocks one is gone."""
    model, data = MAKE[kind](5), samples(kind)
    step = Cut(blocks=(model.blocks[gone],), patch=patch)
    return model, apply(model, Recipe((step,)), data).model, data


@pytest.mark.parametrize("kind", MAKE)
def test_blocks_before_the_cut_and_what_feeds_them_are_the_front(kind: str) -> None:
    model, student, data = cut(kind)
    found = front_of(model, student, data[0])
    assert found.count == 2
    inside = {n for n, _ in student.parameters() if n.startswith(tuple(student.blocks[:2]))}
    behind = {n for n, _ in student.parameters() if n.startswith(tuple(student.blocks[2:]))}
    assert inside <= found.names
    assert not behind & found.names
    rest = found.names - inside
    assert any("embed" in name for name in rest)
    ends = {"bert": set(), "llama": {"model.norm.weight", "lm_head.weight"},
            "vit": {"vit.layernorm.weight", "classifier.weight"}}  # fmt: skip
    assert not ends[kind] & rest


def test_edits_end_the_front() -> None:
    model, _, data = cut("bert")
    assert front_of(model, model.copy(), data[0]) == Front()
    changed = model.copy()
    with torch.no_grad():
        changed.module.get_parameter(f"{model.blocks[1]}.output.dense.bias")[0] += 1
    assert front_of(model, changed, data[0]).count == 1
    with torch.no_grad():
        changed.module.get_parameter("embeddings.LayerNorm.bias")[0] += 1
    assert front_of(model, changed, data[0]) == Front()
    assert front_of(*cut("bert", gone=0)[:2], data[0]) == Front()
    # A patch stands in the block behind the cut.
    assert front_of(*cut("bert", gone=1)[:2], data[0]).count == 1
    pruned = apply(model, Recipe((Prune(0.5, "magnitude"),))).model
    assert front_of(model, pruned, data[0]) == Front()


@pytest.mark.parametrize("kind", MAKE)
@pytest.mark.parametrize("hidden", [0.0, 1.0])
def test_gradients_are_those_of_the_whole_network(kind: str, hidden: float) -> None:
    model, student, data = cut(kind)
    front = front_of(model, student, data[0])
    own = [p for n, p in student.parameters() if n not in front.names]
    found = []
    for count in (0, front.count):
        far = Objective(model, hidden=hidden, precision="float32", front=count)
        for batch in (*data[:2], data[0]):  # the first again: what is known stays known
            value = far(student, batch)
        found.append(torch.autograd.grad(value, own, allow_unused=True))
    # In the mean over blocks the front's count 0, where they are looked at.
    scale = (4 if hidden else 1, 2 if hidden else 1)
    if hidden:
        plain = Objective(model, precision="float32")
        alone = torch.autograd.grad(plain(student, data[0]), own, allow_unused=True)
    for number, (a, b) in enumerate(zip(*found, strict=True)):
        if a is None:
            assert b is None
            continue
        if hidden and alone[number] is not None:
            a, b = a - alone[number], b - alone[number]
        torch.testing.assert_close(scale[0] * a, scale[1] * b, rtol=1e-3, atol=1e-5)


def test_recovery_leaves_the_front_and_is_nearer_behind_it() -> None:
    model, student, data = cut("llama", patch="none")
    kept = front_of(model, student, data[0]).names
    seen = net.text_batch(99)
    far = Objective(model)
    found = {}
    for free in (False, True):
        step = Recover(seconds=0, steps=40, lr=1e-3, hidden=1.0, front=free)
        made = apply(student, Recipe((step,)), data, original=model).model
        old, new = dict(student.parameters()), dict(made.parameters())
        moved = {name for name in old if not torch.equal(old[name], new[name])}
        assert bool(moved & kept) == free
        found[free] = far.exact(made, seen)
    assert max(found.values()) < far.exact(student, seen)


def test_the_front_is_trained_later_on() -> None:
    model, student, data = cut("llama", patch="none")
    kept = front_of(model, student, data[0]).names
    for steps, moves in ((1, False), (2, True)):
        # A decay would show that it is held, not only that it has no slope.
        step = Recover(seconds=0, steps=steps, lr=1e-3, warmup=0.0, front=True, l2=1.0, hidden=1.0)
        made = apply(student, Recipe((step,)), data[:1], original=model).model
        old, new = dict(student.parameters()), dict(made.parameters())
        moved = {name for name in old if not torch.equal(old[name], new[name])}
        assert moved - kept
        assert bool(moved & kept) == moves
