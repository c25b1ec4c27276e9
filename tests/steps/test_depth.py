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
from penjing.errors import InputError, UsageError
from penjing.model import Model
from penjing.recipe import Recipe
from penjing.steps._depth import Budget, angles, evolution, greedy
from penjing.steps._ladder import COSTS
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
    found = [p.block for p in greedy(_bare(model), _count(model, 3))]
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
    assert tuple(sorted(p.block for p in found)) == best


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
        block = model.module.blocks[4]
        block.up.bias.fill_(100.0)  # its slopes are open: the block is linear, and large
        block.down.bias.copy_(-block.down.weight @ block.up.bias)
        block.down.weight.mul_(1.5)
    batches = net.arrays(8)
    gone = {}
    for patch in ("linear", "none"):
        done = apply(model, Recipe((Cut(1, criterion="greedy", patch=patch),)), batches).done
        gone[patch] = next(d.path for d in done if d.kind == "drop")
    assert gone["linear"] == "blocks.4" != gone["none"]


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


def _drops(model: Model, **options: object) -> list[str]:
    step = Cut(part="any", patch="none", **options)  # type: ignore[arg-type]
    return [d.path for d in apply(model, Recipe((step,)), TEXTS).done if d.kind == "drop"]


def test_a_trial_of_blocks_and_halves_is_the_network_really_cut() -> None:
    model = net.llama(4)
    last = {"attention": "self_attn.o_proj", "mlp": "mlp.down_proj"}
    ends = {Piece(i, part): f"model.layers.{i}.{end}" for i in range(4)
            for part, end in last.items()}  # fmt: skip
    trials = Trials(model, TEXTS[:2], lambda first, last: None, ends=ends)
    trials.settle(frozenset({Piece(1), Piece(2, "mlp")}))
    gone = frozenset({Piece(1), Piece(2, "mlp"), Piece(3, "attention"), Piece(0, "mlp")})
    for some in (gone, gone - {Piece(0, "mlp")}):  # with and without what was known
        small = model
        for piece in sorted(some, reverse=True):
            step = Cut(blocks=(f"model.layers.{piece.block}",), part=piece.part, patch="none")
            small = apply(small, Recipe((step,)), TEXTS).model
        reference = [model.run(b).detach() for b in TEXTS[:2]]
        with torch.no_grad():
            found = [small.run(b) for b in TEXTS[:2]]
        wanted = divergence(model.interface, TEXTS[:2], reference, found)
        assert trials(some) == pytest.approx(wanted, rel=1e-3, abs=1e-6)


@pytest.mark.parametrize("criterion", ["influence", "greedy"])
def test_blocks_and_halves_compete(criterion: str) -> None:
    """What does next to nothing goes first, be it a block, an attention or an MLP."""
    model = net.llama(5)
    layers = model.module.model.layers
    with torch.no_grad():
        for layer in (layers[1].self_attn.o_proj, layers[1].mlp.down_proj,
                      layers[3].self_attn.o_proj, layers[4].mlp.down_proj):  # fmt: skip
            layer.weight.mul_(1e-3)

    def size(part: torch.nn.Module) -> int:
        return sum(p.numel() for p in part.parameters())

    free = size(layers[1]) + sum(
        size(p) for p in (layers[3].self_attn, layers[3].input_layernorm,
                          layers[4].mlp, layers[4].post_attention_layernorm)
    )  # fmt: skip
    ratio = free / size(layers)
    wanted = {
        "model.layers.1", "model.layers.3.self_attn", "model.layers.3.input_layernorm",
        "model.layers.4.mlp", "model.layers.4.post_attention_layernorm",
    }  # fmt: skip
    assert set(_drops(model, ratio=ratio, criterion=criterion)) == wanted


@pytest.mark.parametrize("of", ["parameters", "macs"])
@pytest.mark.parametrize("criterion", ["influence", "greedy", "random"])
def test_as_much_goes_as_so_many_blocks_have(criterion: str, of: str) -> None:
    model = net.llama(5)
    step = Cut(2, part="any", of=of, criterion=criterion, patch="none")
    small = apply(model, Recipe((step,)), TEXTS).model
    cost = COSTS[of]
    block = cost(model) - cost(apply(model, Recipe((Cut(1, patch="none"),)), TEXTS).model)
    gone = cost(model) - cost(small)
    assert 2 * block * 0.999 <= gone < 3 * block
    with torch.no_grad():
        assert small.run(TEXTS[0]).isfinite().all()


def test_budgets_by_hand() -> None:
    costs = {Piece(0): 3.0, Piece(1): 3.0, Piece(0, "mlp"): 2.0, Piece(1, "attention"): 1.0}
    budget = Budget(costs, 2.5, (frozenset({0, 1}),))
    assert budget.most == 3.0
    half = frozenset({Piece(0, "mlp")})
    assert budget.saves(Piece(0, "mlp"), frozenset()) == 2.0
    assert budget.saves(Piece(0), frozenset()) == pytest.approx(2.5)  # more is not asked for
    assert budget.saves(Piece(0), half) == pytest.approx(0.5)
    assert set(budget.open(half)) == {Piece(0), Piece(1), Piece(1, "attention")}
    assert set(budget.open(frozenset({Piece(0)}))) == {Piece(1, "attention")}  # one block stays


def test_what_any_refuses() -> None:
    with pytest.raises(UsageError, match="criterion evolution of part any"):
        Cut(1, part="any", criterion="evolution")
    with pytest.raises(UsageError, match="blocks by name with part any"):
        Cut(part="any", blocks=("model.layers.0",))
    with pytest.raises(UsageError, match="unknown of"):
        Cut(1, part="any", of="bytes")
    with pytest.raises(InputError, match="got 95% of their parameters; allowed: at most 80%"):
        _drops(net.llama(5), ratio=0.95)
