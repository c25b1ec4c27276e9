"""The recipe of a choice hits the blocks that the choice means."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import nn

from penjing.apply import apply
from penjing.fit.space import FORMATS, TABLES, Choice, formats_for, recipe_of
from penjing.model import Batch, Model, Source
from penjing.processor import weight_bits
from penjing.recipe import Recipe
from penjing.steps.cut import Cut
from penjing.steps.fold import Fold
from penjing.steps.quantize import Quantize
from penjing.steps.recover import Recover
from penjing.steps.shrink import Shrink

Maker = Callable[..., Model]
STEPS = {s.name: s for s in (Cut, Shrink, Fold, Quantize, Recover)}
TAGS = 1000.0


def tagged(model: Model) -> Model:
    """Block i is told by its last norm's bias, which no step touches."""
    for i in range(len(model.blocks)):
        block = model.module.get_submodule(model.blocks[i])
        block.output.LayerNorm.bias.data[0] = TAGS * (i + 1)
    return model


def tag_of(block: nn.Module) -> int:
    return round(block.output.LayerNorm.bias[0].item() / TAGS) - 1


def applied(model: Model, choice: Choice, batches: list[Batch]) -> Model:
    structural, numbers = recipe_of(model, choice, method="rtn")
    return apply(apply(model, structural, batches).model, numbers, batches).model


@pytest.mark.parametrize("cut", [(), (0,), (1, 3), (0, 1, 2), (4,)])
def test_paths_after_renumbering_are_the_right_blocks(
    cut: tuple[int, ...], bert: Maker, batches: Callable[..., list[Batch]]
) -> None:
    model = tagged(bert(5))
    # A different treatment for every block.
    widths = (1.0, 0.5, 0.75, 1.0, 0.5)
    formats = ("int8", "fp32", "int8", "w4", "w8")
    heads = (0.5, 1.0, 0.5, 1.0, 1.0)
    edited = applied(model, Choice(cut, widths, formats, "e4", "fp32", heads), batches(1))
    kept = [i for i in range(5) if i not in cut]
    assert len(edited.blocks) == len(kept)
    for path, i in zip(edited.blocks, kept, strict=True):
        block = edited.module.get_submodule(path)
        assert tag_of(block) == i
        assert block.intermediate.dense.out_features == 64 * widths[i]
        assert block.attention.output.dense.in_features == 32 * heads[i]
        dense = edited.planes.get(f"{path}.output.dense.weight")
        bits = None if dense is None else dense.bits
        assert bits == {"fp32": None, "int8": (weight_bits(),), "w8": (8,), "w4": (4,)}[formats[i]]
        assert (f"{path}.output.dense" in edited.activations) == (formats[i] == "int8")
    table = edited.planes["embeddings.word_embeddings.weight"]
    assert (table.bits, table.group) == ((4,), 32)


class Pair(nn.Module):
    """Two lists of blocks, one of them with names of its own."""

    def __init__(self) -> None:
        super().__init__()

        def block() -> nn.Sequential:
            return nn.Sequential(nn.Linear(8, 8), nn.Tanh())

        self.first = nn.Sequential(*(block() for _ in range(3)))
        self.second = nn.Sequential()
        for name in ("a", "b", "c"):
            self.second.add_module(name, block())
        self.head = nn.Linear(8, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.second(self.first(x)))


def test_two_lists_and_named_blocks() -> None:
    torch.manual_seed(0)
    blocks = ("first.0", "first.1", "first.2", "second.a", "second.b", "second.c")
    x = torch.randn(16, 8)
    model = Model(Pair().eval(), "tensor", {"x0": x}, Source("test", "pair", ""), blocks)
    for i, path in enumerate(blocks):
        model.module.get_submodule(path)[0].bias.data[0] = TAGS * (i + 1)
    formats = ("w4", "w8", "w4", "w8", "w4", "w8")
    choice = Choice((0, 3), (1.0,) * 6, formats, "fp32", "fp32")
    edited = applied(model, choice, [{"x0": x}])
    assert edited.blocks == ("first.0", "first.1", "second.b", "second.c")
    for path, i in zip(edited.blocks, (1, 2, 4, 5), strict=True):
        assert round(edited.module.get_submodule(path)[0].bias[0].item() / TAGS) == i + 1
        assert edited.planes[f"{path}.0.weight"].bits == ((4,) if formats[i] == "w4" else (8,))
    assert "head.weight" not in edited.planes


def test_every_recipe_survives_toml(bert: Maker) -> None:
    model = bert(3)
    options = itertools.product(
        [(), (1,), (0, 2)], [1.0, 0.75, 0.5], FORMATS, TABLES, FORMATS, [0.0, 5.0]
    )
    for cut, width, name, table, rest, recover in options:
        choice = Choice(cut, (width, 1.0, width), (name, "int8", name), table, rest)
        structural, numbers = recipe_of(model, choice, recover=recover, seed=7)
        whole = Recipe(structural.steps + numbers.steps, 7)
        if whole.steps:
            assert Recipe.from_toml(whole.to_toml(), STEPS) == whole
        # Structure first, then training, then numbers.
        order = {"cut": 0, "shrink": 1, "recover": 2, "fold": 3, "quantize": 4}
        ranks = [order[step.name] for step in whole.steps]
        assert ranks == sorted(ranks)
        trained = any(step.name == "recover" for step in whole.steps)
        assert trained == bool(recover and structural.steps)


def test_formats_suit_the_kind(bert: Maker, llama: Maker) -> None:
    assert formats_for(bert(1))[0] == "int8"
    assert set(formats_for(llama())) == {"w8", "w4"}
    assert all(name in FORMATS for name in (*formats_for(bert(1)), *formats_for(llama())))


def test_words() -> None:
    choice = Choice((1,), (1.0, 1.0, 0.5), ("int8",) * 3, "e4", "fp32")
    assert choice.describe() == "2 of 3 blocks, fp32/int8, 1 narrowed, embeddings 4 bits"
    assert Choice((), (), (), "fp32", "int8").describe() == "int8"
