"""A student derived under a budget."""

import itertools
from typing import Any

import pytest
import torch
from tests.networks import arrays, llama, resnet, stack, text_batch

from penjing.errors import InputError, UsageError
from penjing.model import Model
from penjing.structure import Option, _library, _search, derive


def test_the_library_against_counting_by_hand() -> None:
    teacher = stack(2, width=8, hidden=24)
    library = _library(teacher, arrays(), "parameters")
    # Without normalization the residual stream can lose channels too.
    assert library.pop("inp.weight")[0] == Option()
    assert list(library) == list(teacher.blocks)
    whole = teacher.parameter_count
    for options in library.values():
        assert [dict(o.kept).popitem()[1] if o.kept else 0 for o in options] == [0, 18, 12, 6, 0]
        # A hidden unit has 8 weights in, 8 out and a bias.
        assert options[2].cost == pytest.approx(-12 * 17 / whole)
        assert options[4].gone
        assert options[4].cost == pytest.approx(-(24 * 17 + 8) / whole)
        assert options[0].harm == 0
        assert options[1].harm <= options[2].harm <= options[3].harm


@pytest.mark.parametrize("make", [llama, resnet, stack])
@pytest.mark.parametrize("of", ["macs", "parameters"])
def test_what_is_derived_costs_no_more(make: Any, of: str) -> None:
    teacher = make()
    batches = [text_batch()] if make is llama else [teacher.example]
    batches = arrays() if make is stack else batches
    found = derive(teacher, batches, 0.7, of)
    assert found.share <= 0.7
    if of == "parameters":
        exact = found.model.parameter_count / teacher.parameter_count
        assert found.share == pytest.approx(exact)
    with torch.no_grad():
        assert found.model.run(teacher.example).shape == teacher.run(teacher.example).shape
    assert teacher.structure == []


def test_the_choice_is_the_least_harm_of_all() -> None:
    random = torch.Generator().manual_seed(0)
    library = {
        name: [Option(((name, n),), False, *torch.rand(2, generator=random).tolist())
               for n in range(3)]
        for name in "abc"
    }  # fmt: skip
    library = {name: [Option(o.kept, False, o.harm, -o.cost / 3) for o in own]
               for name, own in library.items()}  # fmt: skip
    made: list[Any] = []

    def cost(_: Model) -> float:
        return 1 + sum(o.cost for o in made[-1].values())

    import penjing.structure as structure

    plain = structure._made
    structure._made = lambda t, b, picked, s: made.append(picked) or t  # type: ignore[func-returns-value, assignment]
    try:
        found = _search(stack(), [], library, 0.5, cost, 0)
    finally:
        structure._made = plain
    fits = [way for way in itertools.product(*library.values())
            if 1 + sum(o.cost for o in way) <= 0.5]  # fmt: skip
    best = min(sum(o.harm for o in way) for way in fits)
    assert found.share <= 0.5
    assert sum(o.harm for o in made[0].values()) == pytest.approx(best)


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
