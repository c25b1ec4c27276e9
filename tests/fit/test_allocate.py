"""Sizes by layer: within the bytes of one size for all, where they are needed, and no worse."""

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
from penjing.errors import InputError, UsageError
from penjing.fit.allocate import allocate, allocated, sizes_near
from penjing.recipe import Recipe
from penjing.steps.quantize import Quantize

STEP = Quantize(bits=3, group=16, scale_bits=16)
BATCHES = net.arrays(10)


def parted() -> net.Model:
    """Two blocks of which the first adds next to nothing to the residual stream."""
    model = net.stack(2, width=32, hidden=48)
    with torch.no_grad():
        model.module.get_submodule("blocks.0.down").weight.mul_(0.01)
    return model


def widths(model: net.Model) -> dict[str, int]:
    return {name: planes.bits[0] for name, planes in model.planes.items()}


def stored(model: net.Model) -> int:
    return sum(planes.stored_bytes for planes in model.planes.values())


def test_bits_go_where_outputs_need_them() -> None:
    model = parted()
    found = allocate(model, STEP, BATCHES[:7], BATCHES[7:])
    made = apply(model, Recipe((found.step,)), BATCHES[:7]).model
    uniform = apply(model, Recipe((STEP,)), BATCHES[:7]).model
    assert stored(made) <= stored(uniform)
    bits = widths(made)
    assert bits["blocks.0.up.weight"] < 3 < bits["blocks.1.up.weight"]
    # The planes are what was said.
    assert bits == {f"{path}.weight": size[0] for path, size in found.sizes.items()}

    @torch.no_grad()
    def off(edited: net.Model) -> float:
        return sum(
            float((1 - torch.cosine_similarity(edited.run(b), model.run(b), -1)).mean())
            for b in net.arrays(20)[10:]
        )

    # On data that neither the codes nor the sizes were made from.
    assert off(made) < 0.8 * off(uniform)
    assert found.divergence < found.uniform


def test_as_good_everywhere_stays_uniform_in_bytes() -> None:
    model = net.stack(3)
    found = allocate(model, STEP, BATCHES[:7], BATCHES[7:], sizes=[(3, 16)])
    assert found.step == STEP
    assert found.divergence == found.uniform
    assert found.evaluations == len(found.sizes) + 1


def test_only_bits_that_are_asked_for() -> None:
    assert {bits for bits, _ in sizes_near(4, (2, 4, 8))} == {2, 4, 8}
    assert {bits for bits, _ in sizes_near(2)} == {2, 3, 4}
    assert {bits for bits, _ in sizes_near(8)} == {7, 8}
    step = allocated(parted(), Quantize(bits=4, group=16, scale_bits=16), BATCHES, (2, 4, 8))
    made = apply(parted(), Recipe((step,)), BATCHES).model
    assert set(widths(made).values()) <= {2, 4, 8}


def test_a_recipe_says_the_sizes() -> None:
    found = allocated(parted(), STEP, BATCHES)
    again = Recipe.from_toml(Recipe((found,)).to_toml(), {"quantize": Quantize})
    assert again.steps == (found,)


def test_refusals() -> None:
    model = net.stack(2)
    for step in (Quantize(2, codes="binary"), Quantize(4, method="rtn")):
        with pytest.raises(UsageError, match="sizes by layer"):
            allocate(model, step, BATCHES[:7], BATCHES[7:])
    with pytest.raises(InputError, match=r"one batch, of .* samples"):
        allocated(model, STEP, BATCHES[:1])


def test_where_nothing_is_lost_sizes_stay_uniform() -> None:
    model = net.stack(2, width=32, hidden=48)
    with torch.no_grad():
        for block in model.blocks:
            model.module.get_submodule(f"{block}.down").weight.mul_(1e-3)
    step = Quantize(bits=8, group=16, targets=("blocks.*",))
    found = allocate(model, step, BATCHES[:7], BATCHES[7:])
    assert found.uniform < 1e-6  # what is left is the arithmetic's
    assert found.step.widths == ()


def test_within_a_limit_it_is_the_best_of_all_recipes() -> None:
    model, sizes = net.stack(3, width=32, hidden=48), ((2, 16), (3, 16), (4, 16))
    step = Quantize(bits=3, group=16, scale_bits=16, targets=("blocks.*.up",))
    search = net.arrays(60)[10:]

    @torch.no_grad()
    def off(edited: net.Model) -> float:
        return sum(
            float((1 - torch.cosine_similarity(edited.run(b), model.run(b), -1)).mean())
            for b in search
        )

    made = {}
    for chosen in itertools.product(sizes, repeat=3):
        widths = tuple(f"blocks.{i}.up={b}/{g}" for i, (b, g) in enumerate(chosen))
        one = Quantize(3, 16, scale_bits=16, targets=step.targets, widths=widths)
        edited = apply(model, Recipe((one,)), BATCHES[:7]).model
        made[chosen] = stored(edited), off(edited)
    assert len(made) == 27
    lowest, highest = (f(size for size, _ in made.values()) for f in (min, max))
    for limit in np.linspace(lowest, highest, 6):
        found = allocate(model, step, BATCHES[:7], search, sizes, limit=8 * limit)
        size, error = made[tuple(found.sizes.values())]
        assert size <= limit
        assert error <= 1.01 * min(e for s, e in made.values() if s <= limit)
    with pytest.raises(UsageError, match="stored bits"):
        allocate(model, step, BATCHES[:7], search, sizes, limit=8 * lowest - 1)
