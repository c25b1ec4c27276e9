"""Variants that share, and suffixes: both against a whole copy that is run from the start."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from penjing.calibrate import Stream, units_of
from penjing.edits import perform
from penjing.fit.space import FORMATS
from penjing.fit.variant import Suffixes, variant
from penjing.model import Batch, Model, Source
from penjing.recipe import Edit, Patch
from penjing.steps.quantize import Quantize
from penjing.steps.shrink import Shrink

Maker = Callable[..., Model]
Batches = Callable[..., list[Batch]]


def whole(base: Model, edits: list[Edit], batches: list[Batch]) -> list[torch.Tensor]:
    """The slow way: copy everything, run everything."""
    twin = base.copy()
    for edit in edits:
        perform(twin, edit)
    with torch.no_grad():
        return [twin.run(b) for b in batches]


def trials(base: Model, data: list[Batch]) -> list[tuple[object, list[Edit]]]:
    """Edits of every kind that a survey makes, in its order."""
    found: list[tuple[object, list[Edit]]] = []
    stream = Stream(base, data)
    width = base.module.get_input_embeddings().embedding_dim
    count = len(base.blocks)
    for unit in units_of(base, stream):
        if unit.index is not None:
            stream.enter(unit.index)
        stats = stream.collect(unit, frozenset({"gram", "range"})) if unit.layers else {}
        for name in ("int8", "w8", "w4"):
            if (step := FORMATS[name].quantize("rtn", ())) is not None:
                edits = [
                    e for e in step.plan(unit, stats) if e.path in stats or e.kind != "activation"
                ]
                found.append((unit, edits))
        if unit.name == "front":
            found.append((unit, list(Quantize(0, embeddings=8, method="rtn").plan(unit, {}))))
        if unit.index is not None:
            found.append((unit, list(Shrink(0.5, heads=0.0).plan(unit, stats))))
            last = unit.index + 1 == count
            near = base.blocks[unit.index + (-1 if last else 1)]
            patch = Patch(
                torch.eye(width) * 0.9, torch.full((width,), 0.1), "after" if last else "before"
            )
            cut = [Edit("patch", near, patch, ""), Edit("drop", unit.name, None, "")]
            found.append((unit, cut))
    return [(unit, edits) for unit, edits in found if edits]


@pytest.mark.parametrize(("kind", "options"), [
    ("bert", {}), ("llama", {"tied": True, "layers": 3}), ("llama", {"tied": False, "layers": 3}),
])  # fmt: skip
def test_a_suffix_gives_what_the_whole_gives(
    kind: str, options: dict[str, object], bert: Maker, llama: Maker, batches: Batches
) -> None:
    base = (bert if kind == "bert" else llama)(**options)
    data = batches(3)
    data[1]["attention_mask"][2, 5:] = 0
    before = {n: t.clone() for n, t in base.module.state_dict().items()}
    suffixes = Suffixes(base, data)
    assert suffixes.exact
    skipped = 0
    with torch.no_grad():
        for unit, edits in trials(base, data[:2]):
            suffixes.enter(unit)  # type: ignore[arg-type]
            skipped += suffixes.first(edits)
            got = list(suffixes.outputs(variant(base, edits), edits))
            for a, b in zip(got, whole(base, edits, data), strict=True):
                assert torch.equal(a, b), (edits[0].kind, edits[0].path)
    assert skipped > 10  # blocks that were not run
    after = base.module.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[n], t) for n, t in before.items())
    assert not base.planes
    assert not base.activations
    assert not base.structure


def test_a_suffix_runs_only_what_is_behind(bert: Maker, batches: Batches) -> None:
    base, data = bert(4), batches(1)
    suffixes = Suffixes(base, data)
    stream = Stream(base, data)
    unit = [*units_of(base, stream)][3]  # front, then blocks 0, 1, 2
    stream.enter(2)
    suffixes.enter(unit)
    edits = [e for e in Quantize(4, method="rtn").plan(unit, {}) if e.kind == "quantize"]
    edited = variant(base, edits)
    ran: list[int] = []
    for number, path in enumerate(base.blocks):
        layer = edited.module.get_submodule(path).output.dense
        layer.register_forward_hook(lambda *_, number=number: ran.append(number))
    with torch.no_grad():
        list(suffixes.outputs(edited, edits))
    assert ran == [2, 3]


def test_a_variant_shares_all_but_what_is_edited(llama: Maker) -> None:
    base = llama(tied=True)
    name = "model.layers.1.mlp.down_proj.weight"
    weight = torch.zeros_like(base.module.get_parameter(name))
    edited = variant(base, [Edit("weight", name, weight, "")])
    own, other = dict(base.parameters()), dict(edited.parameters())
    assert {n for n in own if own[n] is not other[n]} == {name}
    assert not torch.equal(own[name], weight)
    assert torch.equal(other[name], weight)
    # A tied table stays tied, and both ends of it are the variant's own.
    table = base.module.model.embed_tokens.weight
    edited = variant(
        base, [Edit("weight", "model.embed_tokens.weight", torch.zeros_like(table), "")]
    )
    assert edited.module.lm_head.weight is edited.module.model.embed_tokens.weight
    assert edited.module.lm_head.weight is not table
    assert float(table.detach().abs().sum()) > 0


def test_a_tied_head_is_no_suffix(llama: Maker, batches: Batches) -> None:
    data = batches(1)
    for tied, wanted in ((True, 0), (False, 2)):
        suffixes = Suffixes(llama(tied=tied), data)
        head = "lm_head.weight"
        value = torch.zeros(600, 32)
        assert suffixes.first([Edit("weight", head, value, "")]) == wanted
    assert suffixes.first([Edit("weight", "model.norm.weight", torch.zeros(32), "")]) == 0


class Leaky(nn.Module):
    """Every block looks at what the first one was given: no chain."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = x
        for layer in self.layers:
            hidden = layer(hidden + x)
        return hidden


def test_without_a_chain_all_is_run() -> None:
    torch.manual_seed(0)
    data = [{"x": torch.randn(5, 4)}]
    blocks = tuple(f"layers.{i}" for i in range(3))
    base = Model(Leaky().eval(), "tensor", data[0], Source("test", "leaky", ""), blocks)
    suffixes = Suffixes(base, data)
    assert not suffixes.exact
    edits = [Edit("weight", "layers.2.0.weight", torch.ones(4, 4), "")]
    for unit in units_of(base, None):
        suffixes.enter(unit)
    with torch.no_grad():
        (got,) = suffixes.outputs(variant(base, edits), edits)
    assert torch.equal(got, whole(base, edits, data)[0])
