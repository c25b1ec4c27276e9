"""Which blocks go: trials are the networks really cut, greedy is brute force round by round."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import networks as net
from penjing.apply import apply
from penjing.calibrate import Stream
from penjing.divergence import divergence
from penjing.model import Model
from penjing.recipe import Recipe
from penjing.steps._depth import Budget, angles, evolution, greedy
from penjing.steps._trials import Piece, Trials, judges, runs, stages
from penjing.steps.cut import Cut

TEXTS = [net.text_batch(seed) for seed in range(8)]


def _off(model: Model, gone: tuple[int, ...], batches: list[net.Batch]) -> float:
    """Of the network really cut, without patches."""
    step = Cut(blocks=tuple(model.blocks[i] for i in gone), patch="none")
    small = apply(model, Recipe((step,)), TEXTS).model
    reference = [model.run(b).detach() for b in batches]
    with torch.no_grad():
        return divergence(model.interface, batches, reference, [small.run(b) for b in batches])


def _blocks(*indices: int) -> frozenset[Piece]:
    return frozenset(Piece(i) for i in indices)


def _count(model: Model, amount: int) -> Budget:
    costs = {Piece(i): 1.0 for i in range(len(model.blocks))}
    return Budget(costs, amount, stages(model.blocks))


def _bare(model: Model) -> Trials:
    return Trials(model, TEXTS[:2], lambda first, last: None)


@pytest.mark.parametrize("make", [net.bert, net.llama])
def test_a_trial_is_the_network_really_cut(make) -> None:  # type: ignore[no-untyped-def]
    model = make(5)
    trials = _bare(model)
    for base in ((), (2,), (2, 3), (0, 3)):
        trials.settle(_blocks(*base))
        for extra in range(5):
            gone = tuple(sorted({*base, extra}))
            assert trials(_blocks(*gone)) == pytest.approx(
                _off(model, gone, TEXTS[:2]), rel=1e-3, abs=1e-6
            )


def test_greedy_is_brute_force_round_by_round() -> None:
    model = net.llama(5)
    found = [p.index for p in greedy(_bare(model), _count(model, 3))]
    base: list[int] = []
    left = set(range(5))
    for number in range(3):
        tried = {i: _off(model, tuple(sorted([*base, i])), TEXTS[:2]) for i in left}
        order = sorted(tried, key=tried.__getitem__)
        base.append(order[0])
        left = set(order[1 : max(3 - number, 4, len(order) // 2)])
    assert found == base


def test_evolution_is_no_worse_than_single_scores_and_finds_the_best_of_few() -> None:
    model = net.bert(5)
    best = min(itertools.combinations(range(5), 2), key=lambda g: _off(model, g, TEXTS[:2]))
    found = evolution(_bare(model), _count(model, 2), 6, 0)
    assert tuple(sorted(p.index for p in found)) == best


def test_angles_by_hand() -> None:
    model, batches = net.stack(4), net.arrays(2)
    found = angles(Stream(model, batches), 2)
    assert set(found) == {0, 1, 2}
    with torch.no_grad():
        hidden = [model.module.inp(b["x"]) for b in batches]
        for first in (0, 1, 2):
            ends = [model.module.blocks[first + 1](model.module.blocks[first](h)) for h in hidden]
            x, y = (torch.cat([t.flatten(0, 1) for t in ts]).double().numpy()
                    for ts in (hidden, ends))  # fmt: skip
            cosine = (x * y).sum(1) / np.linalg.norm(x, axis=1) / np.linalg.norm(y, axis=1)
            assert found[first] == pytest.approx(np.arccos(cosine).mean() / np.pi, rel=1e-4)
            hidden = [model.module.blocks[first](h) for h in hidden]


def test_the_angular_criterion_takes_neighbours() -> None:
    model = net.llama(5)
    done = apply(model, Recipe((Cut(3, criterion="angular"),)), TEXTS).done
    gone = sorted(int(d.path.rpartition(".")[2]) for d in done if d.kind == "drop")
    assert gone == list(range(gone[0], gone[0] + 3))
    found = angles(Stream(model, TEXTS), 3)
    assert gone[0] == min(found, key=found.__getitem__)


def test_greedy_looks_at_the_patched_network() -> None:
    """A block that is linear is nothing to lose where a patch stands in for it."""
    model = net.stack(5)
    with torch.no_grad():
        block = model.module.blocks[3]
        block.up.bias.fill_(100.0)  # its slopes are open: the block is linear, and large
        block.down.bias.copy_(-block.down.weight @ block.up.bias)
        block.down.weight.mul_(1.5)
    batches = net.arrays(8)
    gone = {}
    for patch in ("linear", "none"):
        done = apply(model, Recipe((Cut(1, criterion="greedy", patch=patch),)), batches).done
        gone[patch] = next(d.path for d in done if d.kind == "drop")
    assert gone["linear"] == "blocks.3" != gone["none"]


def test_runs() -> None:
    assert runs(frozenset({1, 2, 4, 7, 8, 9})) == [(1, 2), (4, 4), (7, 9)]
    assert runs(frozenset()) == []
    assert runs({1, 2, 3}, {0, 3}) == [(1, 2), (3, 3)]


def test_judges_are_the_last_samples_and_few() -> None:
    model = net.llama(2)
    found = judges(model, [net.text_batch(s, samples=4, length=12) for s in range(8)])
    assert [len(b["input_ids"]) for b in found] == [4, 4]
    assert torch.equal(found[0]["input_ids"], net.text_batch(6)["input_ids"])
    many = [net.text_batch(s, samples=64, length=32, padded=False) for s in range(8)]
    assert sum(int(b["attention_mask"].sum()) for b in judges(model, many)) == 512
    assert len(judges(model, many[:1])[0]["input_ids"]) == 16
