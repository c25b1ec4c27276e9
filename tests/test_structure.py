"""A student derived under a budget."""

import itertools
from typing import Any

import pytest
import torch
from tests.networks import arrays, bert, llama, resnet, stack, text_batch

from penjing.apply import apply
from penjing.errors import InputError, UsageError
from penjing.model import Model
from penjing.steps._ladder import COSTS
from penjing.structure import _choices, _measure, derive
from penjing.transferring.forms import BLOCK, Forms, Option
from penjing.transferring.library import library


def counted(teacher: Model, of: str = "parameters") -> Any:
    return lambda model: COSTS[of](model) / COSTS[of](teacher)


def test_the_library_against_counting_by_hand() -> None:
    teacher = stack(2, width=8, hidden=24)
    fit, held = arrays()[:-1], arrays()[-1:]
    options = library(teacher, Forms(teacher, fit[0], counted(teacher)), fit, held)
    # Without normalization the residual stream can lose channels too.
    assert options.pop("inp.weight")[0] == Option()
    assert list(options) == list(teacher.blocks)
    whole = teacher.parameter_count
    for own in options.values():
        assert [dict(o.kept).popitem()[1] if o.kept else 0 for o in own] == [0, 18, 12, 6, 0, 0]
        # A hidden unit has 8 weights in, 8 out and a bias.
        assert own[2].cost == pytest.approx(-12 * 17 / whole)
        assert own[4].gone == ("mlp",)
        assert own[5].gone == (BLOCK,)
        assert own[4].cost == pytest.approx(-(24 * 17 + 8) / whole)
        assert own[5].cost == pytest.approx(-(24 * 17 + 8 - 8 * 9) / whole)  # with its patch
        assert own[0].harm == 0


def test_harms_are_of_samples_that_nothing_was_fitted_to(monkeypatch: Any) -> None:
    """The harm of half of a block's units against making that network and running it."""
    teacher = bert(2)
    fit, held = [text_batch(1), text_batch(2)], [text_batch(3)]
    forms = Forms(teacher, fit[0], counted(teacher))
    options = library(teacher, forms, fit, held)
    first = teacher.blocks[0]
    (half,) = (o for o in options[first] if not o.gone and len(o.kept) == 1
               and o.kept[0][1] == 24)  # fmt: skip
    made = apply(teacher, forms.recipe({first: half}), fit).model
    with torch.no_grad():
        outputs = [m.run(held[0]) for m in (made, teacher)]
    harm = 1 - float(torch.cosine_similarity(*outputs).mean())
    # `shrink` looks at what the block gave before too: near, not the same.
    assert half.harm == pytest.approx(harm, rel=0.5)
    again = library(teacher, forms, fit, [text_batch(4)])
    assert again[first][1].harm != options[first][1].harm


@pytest.mark.parametrize("make", [bert, llama])
def test_halves_and_blocks_of_a_transformer(make: Any) -> None:
    teacher = make(3)
    fit, held = [text_batch(1)], [text_batch(2)]
    forms = Forms(teacher, fit[0], counted(teacher, "macs"))
    options = library(teacher, forms, fit, held)
    assert list(options) == list(teacher.blocks)
    costs = {}
    for own in options.values():
        assert {o.gone for o in own} == {
            (), ("attention",), ("mlp",), ("attention", "mlp"), (BLOCK,)
        }  # fmt: skip
        for option in own:
            assert option.harm >= 0
            costs.setdefault((tuple(n for _, n in option.kept), option.gone), set()).add(
                round(option.cost, 9)
            )
    assert all(len(same) == 1 for same in costs.values())  # blocks of one shape cost the same
    # What is made has the shape that was counted, and runs.
    picked = {teacher.blocks[0]: options[teacher.blocks[0]][-2],
              teacher.blocks[1]: options[teacher.blocks[1]][5],
              teacher.blocks[2]: options[teacher.blocks[2]][-1]}  # fmt: skip
    made = apply(teacher, forms.recipe(picked), fit).model
    # The counted form has a patch, 32 by 32 of 32 tokens, also where none helps.
    patches = sum(entry["kind"] == "patch" for entry in made.structure)
    counted_form = COSTS["macs"](forms.form(picked)) - (1 - patches) * 32**3
    assert COSTS["macs"](made) == pytest.approx(counted_form)
    with torch.no_grad():
        assert made.run(held[0]).shape == teacher.run(held[0]).shape


@pytest.mark.parametrize("make", [bert, llama, resnet, stack])
@pytest.mark.parametrize("of", ["macs", "parameters"])
def test_what_is_derived_costs_no_more(make: Any, of: str) -> None:
    teacher = make()
    batches = [text_batch(), text_batch(1)] if make in (bert, llama) else [teacher.example]
    batches = arrays() if make is stack else batches
    found = derive(teacher, batches, 0.7, of)
    assert found.share <= 0.7
    if of == "parameters":
        exact = found.model.parameter_count / teacher.parameter_count
        assert found.share == pytest.approx(exact)
    with torch.no_grad():
        assert found.model.run(teacher.example).shape == teacher.run(teacher.example).shape
    assert teacher.structure == []


def test_latency_is_of_the_runtime() -> None:
    teacher = stack(8, width=64, hidden=1024)
    with _measure(teacher, "latency", 16, 1) as measure:
        forms = Forms(teacher, teacher.example, measure)
        whole = measure(forms.form({}))
        few = measure(forms.form({b: Option((), (BLOCK,)) for b in teacher.blocks[:6]}))
    assert whole == pytest.approx(1, abs=0.5)
    assert few < 0.8 * whole


def test_the_choices_are_the_least_harm_for_every_number_of_blocks() -> None:
    random = torch.Generator().manual_seed(0)

    def option(gone: bool) -> Option:
        harm, cost = torch.rand(2, generator=random).tolist()
        return Option((), (BLOCK,) if gone else (), harm, -cost / 3)

    options = {name: [option(False), option(False), option(True)] for name in "abcd"}

    class Counted:
        """Costs that add up."""

        def form(self, picked: Any) -> Any:
            return picked

        def measure(self, picked: Any) -> float:
            return 1 + sum(o.cost for o in picked.values())

    forms: Any = Counted()
    found = {sum(BLOCK in o.gone for o in picked.values()): (cost, harm)
             for picked, cost, harm in _choices(options, forms, 0.5)}  # fmt: skip
    for count in range(4):
        fits = [way for way in itertools.product(*options.values())
                if 1 + sum(o.cost for o in way) <= 0.5
                and sum(BLOCK in o.gone for o in way) == count]  # fmt: skip
        best = min((sum(o.harm for o in way) for way in fits), default=None)
        assert (count in found) == (best is not None)
        if best is not None:
            assert found[count][0] <= 0.5
            assert found[count][1] >= best - 1e-9
    assert found


def test_what_is_refused() -> None:
    teacher = stack()
    with pytest.raises(UsageError, match="latency, macs, parameters"):
        derive(teacher, arrays(), 0.5, "luck")
    with pytest.raises(UsageError, match="0 < share < 1"):
        derive(teacher, arrays(), 1.5)
    with pytest.raises(UsageError, match="needs data"):
        derive(teacher, [], 0.5)
    with pytest.raises(InputError, match="at least"):
        derive(teacher, arrays(), 0.01, "parameters")
