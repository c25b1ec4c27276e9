"""Blocks, and which neurons go together: known networks, and blocks built to mislead."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent))
from transformers import BartConfig, BartModel

import networks as net
from penjing.calibrate import Stream
from penjing.channelmap import map_of
from penjing.graph import find_blocks, is_weighted
from penjing.steps._neurons import Group


def test_blocks_of_transformers() -> None:
    assert net.bert(3).blocks == tuple(f"encoder.layer.{i}" for i in range(3))
    assert net.llama(2).blocks == ("model.layers.0", "model.layers.1")
    found = net.vit(3).blocks
    assert len(found) == 3
    assert {b.rpartition(".")[2] for b in found} == {"0", "1", "2"}


def test_blocks_of_an_encoder_and_a_decoder() -> None:
    config = BartConfig(
        d_model=16, encoder_layers=2, decoder_layers=3, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16, vocab_size=20,
        max_position_embeddings=16,
    )  # fmt: skip
    assert find_blocks(BartModel(config)) == (
        "encoder.layers.0", "encoder.layers.1",
        "decoder.layers.0", "decoder.layers.1", "decoder.layers.2",
    )  # fmt: skip


def test_blocks_of_stages_are_their_members() -> None:
    assert find_blocks(net.ResNet()) == ("layer1.0", "layer1.1", "layer2.0", "layer2.1")

    class Stage(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.units = nn.ModuleList(net.MlpBlock(width, 4) for _ in range(2))

    staged = nn.ModuleDict({"stages": nn.ModuleList([Stage(4), Stage(8)])})
    assert find_blocks(staged) == tuple(f"stages.{s}.units.{u}" for s in (0, 1) for u in (0, 1))


def test_a_plain_sequential_has_no_blocks() -> None:
    plain = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    assert find_blocks(plain) == ()
    assert find_blocks(nn.Sequential(plain, nn.Linear(4, 2))) == ()


def test_what_is_weighted() -> None:
    assert all(map(is_weighted, (nn.Linear(1, 1), nn.Conv2d(1, 1, 1), nn.Embedding(1, 1))))
    assert not any(map(is_weighted, (nn.LayerNorm(1), nn.BatchNorm2d(1), nn.ReLU())))


def _groups(block: nn.Module, run: Callable[[nn.Module, torch.dtype], Tensor]) -> dict[str, Group]:
    known = [Group.of(free.group) for free in map_of(block.eval(), run).free]
    return {g.consumer: g for g in known if g is not None}


def _simple(block: nn.Module, width: int = 6) -> dict[str, Group]:
    torch.manual_seed(1)
    x = torch.randn(1, 8, width)
    return _groups(block, lambda b, dtype: b(x.to(dtype)))


def _from_stream(model: net.Model) -> dict[str, Group]:
    stream = Stream(model, [model.example])
    stream.enter(0)
    call = stream.sample().first(1, 8).double()
    block = model.module.get_submodule(model.blocks[0])
    return _groups(block, lambda b, dtype: call.run(b, call.hidden))


def test_heads_and_hidden_units_of_bert() -> None:
    groups = _from_stream(net.bert())
    assert set(groups) == {"attention.output.dense", "output.dense"}
    heads = tuple(tuple(range(8 * h, 8 * h + 8)) for h in range(4))
    assert groups["attention.output.dense"].units == heads
    assert groups["attention.output.dense"].producers == {
        f"attention.self.{n}": heads for n in ("query", "key", "value")
    }
    units = tuple((i,) for i in range(48))
    assert groups["output.dense"].units == units
    assert groups["output.dense"].producers == {"intermediate.dense": units}


def test_key_value_groups_and_gates_of_llama() -> None:
    groups = _from_stream(net.llama())
    assert set(groups) == {"self_attn.o_proj", "mlp.down_proj"}
    # 8 heads of 4 on 4 key-value heads: a unit is two heads.
    two = tuple(tuple(range(8 * g, 8 * g + 8)) for g in range(4))
    one = tuple(tuple(range(4 * g, 4 * g + 4)) for g in range(4))
    assert groups["self_attn.o_proj"].units == two
    assert groups["self_attn.o_proj"].producers == {
        "self_attn.q_proj": two, "self_attn.k_proj": one, "self_attn.v_proj": one,
    }  # fmt: skip
    units = tuple((i,) for i in range(48))
    assert groups["mlp.down_proj"].producers == {"mlp.gate_proj": units, "mlp.up_proj": units}


def test_names_do_not_matter() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.xyzzy, self.q = nn.Linear(6, 10), nn.Linear(10, 6)

        def forward(self, x: Tensor) -> Tensor:
            # The hidden units are shuffled on their way.
            return x + self.q(torch.relu(self.xyzzy(x)).flip(-1))

    group = _simple(Odd())["q"]
    assert set(group.producers) == {"xyzzy"}
    pairs = zip(group.units, group.producers["xyzzy"], strict=True)
    assert sorted(pairs) == [((i,), (9 - i,)) for i in range(10)]


@pytest.mark.parametrize("shift", [-3.0, 3.0])
def test_a_relu_hides_no_unit(shift: float) -> None:
    block = net.MlpBlock(6, 300)
    nn.init.constant_(block.up.bias, shift)  # nearly all off, nearly all on
    assert len(_simple(block)["down"].units) == 300


class Frozen(nn.Module):
    """A plain MLP with something that ties its hidden units elsewhere."""

    def __init__(self, forward: Callable[[Frozen, Tensor], Tensor], hidden: int = 10) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, hidden), nn.Linear(hidden, 6)
        self.side, self.norm = nn.Linear(hidden, 6), nn.LayerNorm(hidden)
        self.gamma = nn.Parameter(torch.randn(hidden))
        self._forward = forward

    def forward(self, x: Tensor) -> Tensor:
        return self._forward(self, x)


LEAKS: dict[str, tuple[Callable[[Frozen, Tensor], Tensor], int]] = {
    "two consumers": (lambda m, x: m.down(torch.relu(m.up(x))) + m.side(torch.tanh(m.up(x))), 10),
    "into the output": (lambda m, x: m.down(h := torch.relu(m.up(x))) + h, 6),
    "residual sum": (lambda m, x: m.down(x + m.up(x)) + m.up(x), 6),
    "norm over all": (lambda m, x: x + m.down(m.norm(m.up(x))), 10),
    "softmax over all": (lambda m, x: x + m.down(m.up(x).softmax(-1)), 10),
    "statistic of all": (lambda m, x: m.down(h := m.up(x)) * h.mean(), 10),
    "a consumer of no effect": (lambda m, x: (m.side(h := m.up(x)), m.down(h))[1], 10),
    "NaN": (lambda m, x: m.down(m.up(x)) * float("nan"), 10),
}


@pytest.mark.parametrize("name", LEAKS)
def test_what_leaks_is_left_alone(name: str) -> None:
    forward, hidden = LEAKS[name]
    assert "down" not in _simple(Frozen(forward, hidden))


def test_what_does_not_leak_is_free() -> None:
    some = Frozen(lambda m, x: m.down(h := torch.relu(m.up(x))) + h[..., :6])
    assert _simple(some)["down"].units == ((6,), (7,), (8,), (9,))


def test_the_same_block_without_the_leak_is_grouped() -> None:
    assert len(_simple(Frozen(lambda m, x: x + m.down(torch.relu(m.up(x)))))["down"].units) == 10


def test_a_residual_around_the_producer_is_not_cut_on_the_sum() -> None:
    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            y = x + self.a(x)
            return y + self.c(torch.relu(self.b(y)))

    assert set(_simple(Residual())) == {"c"}


def test_the_block_stays_as_it_is() -> None:
    block = net.MlpBlock(6, 10)
    before = {n: p.clone() for n, p in block.named_parameters()}
    _simple(block)
    assert all(torch.equal(p, before[n]) and p.dtype == torch.float32
               for n, p in block.named_parameters())  # fmt: skip
    assert not block.up._forward_hooks
    assert not block.down._forward_hooks
