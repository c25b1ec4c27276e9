"""Blocks that are the same but for the order of their units are one."""

from typing import Any

import pytest
import torch
from tests.networks import bert, llama, resnet, stack
from torch import Tensor

from penjing.channelmap import channel_map
from penjing.model import Model
from penjing.transferring.merging import even_runs, merged
from penjing.transferring.parameters import inherit


def twins(model: Model) -> None:
    """Every block becomes the first one, its units in an order of its own."""
    first, *others = model.blocks
    state = model.module.get_submodule(first).state_dict()
    for number, path in enumerate(others):
        model.module.get_submodule(path).load_state_dict(state)
        for free in channel_map(model).free:
            names = [m.name for m in free.group.members]
            if not all(name.startswith(f"{path}.") for name in names):
                continue
            generator = torch.Generator().manual_seed(number)
            order = torch.randperm(free.group.count, generator=generator)
            for member in free.group.members:
                moved = model.module.get_parameter(member.name).detach().movedim(member.dim, 0)
                given = moved.clone()
                moved[member.places] = given[member.places[order]]


def left(model: Model, output: Tensor) -> float:
    with torch.no_grad():
        found = model.run(model.example)
    return float((found - output).norm() / output.norm())


@pytest.mark.parametrize("make", [bert, llama, stack])
def test_blocks_that_differ_in_order_alone_lose_nothing(make: Any) -> None:
    model = make(4)
    twins(model)
    with torch.no_grad():
        wanted = model.run(model.example)
        plain = model.copy()  # the mean without an order is another network
        one, two = (plain.module.get_submodule(plain.blocks[n]) for n in (0, 1))
        for a, b in zip(two.parameters(), one.parameters(), strict=True):
            a.copy_((a + b) / 2)
    assert left(plain, wanted) > 0.01
    assert left(merged(model, even_runs(4, 2)), wanted) < 1e-5


def test_the_mean_is_of_all_blocks_of_a_run() -> None:
    model = stack(3)
    with torch.no_grad():
        for number, path in enumerate(model.blocks):
            for parameter in model.module.get_submodule(path).parameters():
                parameter.fill_(number)
    made = merged(model, [range(1), range(1, 3)])
    values = [{float(x) for p in made.module.get_submodule(b).parameters() for x in p.flatten()}
              for b in made.blocks]  # fmt: skip
    assert values == [{0.0}, {1.0}, {1.5}]


def test_runs_are_even() -> None:
    assert [list(run) for run in even_runs(6, 3)] == [[0, 1], [2, 3], [4, 5]]
    assert [list(run) for run in even_runs(5, 2)] == [[0, 1], [2, 3, 4]]


def test_a_block_of_another_shape_is_left_out() -> None:
    model = resnet()
    state = {n: x.clone() for n, x in model.module.state_dict().items()}
    made = merged(model, [range(2), range(2, 4)])
    unlike = made.module.get_submodule(made.blocks[3]).state_dict()
    assert all(torch.equal(x, state[f"{made.blocks[3]}.{n}"]) for n, x in unlike.items())


def test_a_shallower_student_begins_with_merged_blocks() -> None:
    teacher, student = bert(4), bert(2)
    twins(teacher)
    found = inherit(student, teacher, [teacher.example], merge=True)
    assert found.blocks == (1, 3)
    assert "neighbours merged" in found.why
    wanted = inherit(student, teacher, [teacher.example])
    # All blocks are one: it makes no difference which are left.
    with torch.no_grad():
        outputs = [made.model.run(teacher.example) for made in (found, wanted)]
    torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-5)
