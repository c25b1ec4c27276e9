"""Groups ranked against each other: the target is met, and what matters least goes first."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import networks as net
from penjing.apply import apply
from penjing.batching import rebatched
from penjing.channelmap import channel_map
from penjing.errors import InputError, UsageError
from penjing.inspect import inspect
from penjing.model import Batch, Model
from penjing.recipe import Recipe
from penjing.steps._ladder import Forms
from penjing.steps._ranking import groups_for, harms
from penjing.steps.shrink import Shrink

STEPS = {"shrink": Shrink}


def cost(model: Model, of: str) -> float:
    found = inspect(model, latency=False).totals
    return float((found.parameters if of == "parameters" else found.macs) or 0)


def pictures(count: int = 2) -> list[Batch]:
    generator = torch.Generator().manual_seed(1)
    return [{"x": torch.randn(4, 3, 8, 8, generator=generator)} for _ in range(count)]


def widths(model: Model) -> dict[str, int]:
    """Units of every group, by name."""
    return {free.group.name: free.group.count for free in channel_map(model).free}


NETS: dict[str, tuple[Callable[[], Model], list[Batch]]] = {
    "bert": (lambda: net.bert(2), [net.text_batch(1), net.text_batch(2)]),
    "resnet": (net.resnet, pictures()),
}


@pytest.mark.parametrize(
    ("name", "ranking", "of"),
    [
        ("bert", "global", "macs"), ("bert", "measured", "parameters"),
        ("resnet", "layer", "macs"), ("resnet", "layer", "parameters"),
        ("resnet", "global", "parameters"), ("resnet", "measured", "macs"),
    ],
)  # fmt: skip
def test_the_target_is_met_to_a_unit(name: str, ranking: str, of: str) -> None:
    make, batches = NETS[name]
    model = make()
    step = Shrink(0.3, of=of, ranking=ranking, multiple=1)
    done = apply(model, Recipe((step,)), batches).model
    whole, left = cost(model, of), cost(done, of)
    assert left <= 0.7 * whole
    before = widths(model)
    # A group of one unit is none.
    kept = {name: widths(done).get(name, 1) for name in before}
    # One unit more, of every group or of some group, and it would not be met.
    some = [kept | {name: n + 1} for name, n in kept.items() if n < before[name]]
    every = {name: min(n + 1, before[name]) for name, n in kept.items()}
    forms = Forms(model, channel_map(model).free)
    again = [cost(forms.form(k), of) for k in ([every] if ranking == "layer" else some)]
    assert max(again) > 0.7 * whole


def test_global_takes_the_least_score_for_its_cost() -> None:
    """Of two stacks' hidden units, against a sort by hand."""
    model, batches = net.stack(2), net.arrays(2)
    with torch.no_grad():
        model.module.blocks[0].up.weight *= torch.linspace(0.1, 1, 24)[:, None]
        model.module.blocks[1].up.weight *= torch.linspace(0.8, 1, 24)[:, None]
    step = Shrink(
        0.25, of="parameters", ranking="global", multiple=1, criterion="l2", targets=("blocks.*",)
    )
    done = apply(model, Recipe((step,)), batches).model
    scores = []
    for index in range(2):
        power = model.module.blocks[index].up.weight.detach().double().square().sum(1).numpy()
        scores += [(value / power.mean(), index) for value in power]
    one = 8 + 1 + 8  # a row, its bias and a column
    gone = int(np.ceil(0.25 * model.parameter_count / one))
    counts = np.bincount([index for _, index in sorted(scores)[:gone]], minlength=2)
    for index in range(2):
        assert done.module.blocks[index].up.out_features == 24 - counts[index]


def test_a_block_that_does_nothing_goes_first() -> None:
    model, batches = net.stack(3), net.arrays(4)
    with torch.no_grad():
        model.module.blocks[1].down.weight *= 1e-3
    one, gone = 8 + 1 + 8, 0.2 * model.parameter_count
    kept = {}
    for ranking, criterion in (("global", "gram"), ("measured", "gram"), ("global", "wanda")):
        step = Shrink(
            0.2, of="parameters", ranking=ranking, criterion=criterion, multiple=1,
            targets=("blocks.*.down",),
        )  # fmt: skip
        settled = step.settled(model, batches)
        kept[ranking, criterion] = [settled.kept[f"blocks.{i}.up.weight"] for i in range(3)]
    wanted = [24, 24 - int(np.ceil(gone / one)), 24]
    assert kept["global", "gram"] == kept["measured", "gram"] == wanted
    # What its own reader gives is as large a share of itself as in any other block.
    assert kept["global", "wanda"][1] > wanted[1]


def test_measured_harm_is_what_half_of_a_group_alone_does() -> None:
    model, batches = net.stack(2), net.arrays(8)
    step = Shrink(0.3, of="macs", ranking="measured", multiple=4, targets=("blocks.*.down",))
    groups = groups_for(model, step)
    assert [g.stays for g in groups] == [(24, 20, 16, 12, 8, 4)] * 2
    for group, harm in harms(model, step, batches, groups):
        alone = Shrink(kept={group.units.name: 12})
        small = apply(model, Recipe((alone,)), batches[:6]).model  # a quarter is held out
        lost = []
        for batch in batches[6:]:
            a, b = model.run(batch).detach().flatten(1), small.run(batch).detach().flatten(1)
            lost += (1 - torch.cosine_similarity(a, b)).tolist()
        assert float(harm[:12].sum()) == pytest.approx(np.mean(lost), rel=1e-3)


def test_heads_with_a_ratio_of_their_own_are_left_out() -> None:
    model = net.bert(2)
    step = Shrink(0.2, heads=0.0, of="parameters", ranking="global", multiple=1)
    kept = step.settled(model, [net.text_batch(1)]).kept
    heads = {f.group.name for f in channel_map(model).free if f.group.is_heads}
    assert heads
    assert all((n == 4) == (name in heads) for name, n in kept.items())


def test_a_recipe_holds_the_ranking_or_the_units(tmp_path: Path) -> None:
    model = net.stack(2)
    batches = rebatched(model, net.arrays(12))
    ranked = Shrink(0.3, of="macs", ranking="measured", multiple=1)
    recipe = Recipe((ranked,))
    assert Recipe.from_toml(recipe.to_toml(), STEPS) == recipe
    first = apply(model, recipe, batches, journal=tmp_path / "journal").model
    # Finished units are read back.
    assert net.same(apply(model, recipe, batches, journal=tmp_path / "journal").model, first)
    counted = Recipe((ranked.settled(model, batches),))
    assert Recipe.from_toml(counted.to_toml(), STEPS) == counted
    assert net.same(apply(model, counted, batches).model, first)


def test_kept_units_and_all_others() -> None:
    model = net.stack(2)
    done = apply(model, Recipe((Shrink(kept={"blocks.1.up.weight": 7}),)), net.arrays(2)).model
    assert widths(done) == widths(model) | {"blocks.1.up.weight": 7}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"of": "latency"}, "of; got 'latency'; allowed: units, parameters, macs"),
        ({"ranking": "local"}, "ranking; got 'local'; allowed: layer, global, measured"),
        ({"ranking": "global"}, "ranking global of units"),
        ({"kept": {"a": 0}}, "kept units"),
        ({"kept": (3,)}, "kept units"),
    ],
)
def test_options_that_make_no_sense(options: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Shrink(**options)


def test_a_group_that_is_not_there() -> None:
    with pytest.raises(InputError, match=r"no group of the network; got blocks.9.*--groups"):
        apply(net.stack(), Recipe((Shrink(kept={"blocks.9.up.weight": 3}),)), net.arrays(1))


def test_more_than_there_is() -> None:
    step = Shrink(0.99, of="parameters", ranking="global")
    with pytest.raises(InputError, match="cannot take 99% of the parameters"):
        step.settled(net.bert(), [net.text_batch(1)])
    with pytest.raises(UsageError, match="shrink needs data"):
        step.settled(net.bert(), [])
