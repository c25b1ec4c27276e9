import itertools

import torch
from tests.networks import arrays, stack

from penjing.transferring.depth import ascending, by_cka


def test_a_network_is_most_like_itself() -> None:
    model = stack(4)
    assert by_cka(model, model, arrays()) == (0, 1, 2, 3)


def test_a_shallower_one_has_the_blocks_it_was_made_of() -> None:
    teacher = stack(6)
    student = teacher.copy()
    # A block whose last layer is zero gives what it got.
    for n in (1, 2, 4):
        torch.nn.init.zeros_(student.module.blocks[n].down.weight)
        torch.nn.init.zeros_(student.module.blocks[n].down.bias)
    found = by_cka(student, teacher, arrays())
    assert found[0] == 0
    assert list(found) == sorted(found)


def test_ascending_against_every_way() -> None:
    gain = torch.rand(4, 6, generator=torch.Generator().manual_seed(1)).tolist()
    ways = [w for w in itertools.product(range(6), repeat=4) if list(w) == sorted(w)]
    best = max(ways, key=lambda way: sum(row[j] for row, j in zip(gain, way, strict=True)))
    assert ascending(gain) == best
