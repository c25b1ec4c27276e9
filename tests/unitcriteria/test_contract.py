"""Every criterion of whole units: shape, determinism, purity, and a unit of no use goes first."""

from types import SimpleNamespace

import pytest
import torch

from penjing import registry
from penjing.layerstats import Gradient
from penjing.unitcriteria._view import Reading, View

NAMES = registry.choices("unitcriteria")
UNITS, SPARE = 6, 3  # the number of the unit of no use


def example(seed: int) -> View:
    """Units of two inputs each that two layers make and two read."""
    generator = torch.Generator().manual_seed(seed)

    def numbers(*shape: int) -> torch.Tensor:
        # Far from zero, so that the spare unit is far from all.
        sign = torch.randint(0, 2, shape, generator=generator) * 2 - 1
        return sign * (1 + torch.rand(shape, generator=generator))

    made = tuple(numbers(UNITS, 2 * 5) for _ in range(2))
    gains = (numbers(UNITS, 2),)
    readings = []
    for _ in range(2):
        columns = torch.randperm(2 * UNITS, generator=generator).reshape(UNITS, 2)
        size, effects = numbers(2 * UNITS).abs().double(), numbers(20, 2 * UNITS)
        size[columns[SPARE]] = 0.01
        effects[:, columns[SPARE]] *= 0.01
        gradient = Gradient(torch.zeros(1, 1), torch.zeros(1, 1), effects)
        readings.append(Reading(columns, SimpleNamespace(size=size, gradient=gradient)))
    for own in (*made, *gains):
        own[SPARE] *= 0.01
    return View(made, gains, tuple(readings))


@pytest.mark.parametrize("name", NAMES)
def test_one_score_a_unit_and_nothing_changes(name: str) -> None:
    score = registry.lookup("unitcriteria", name, "score")
    view, again = example(0), example(0)
    first, second = score(view), score(view)
    assert first.shape == (UNITS,)
    assert first.is_floating_point()
    assert not first.requires_grad
    assert torch.equal(first, second)
    assert bool(torch.isfinite(first).all())
    assert all(map(torch.equal, view.made, again.made))
    assert all(map(torch.equal, view.gains, again.gains))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("seed", range(4))
def test_a_unit_of_no_use_goes_first(name: str, seed: int) -> None:
    scores = registry.lookup("unitcriteria", name, "score")(example(seed))
    assert int(scores.argmin()) == SPARE


@pytest.mark.parametrize("name", NAMES)
def test_the_order_of_the_units_does_not_matter(name: str) -> None:
    score, view = registry.lookup("unitcriteria", name, "score"), example(1)
    order = torch.tensor([4, 2, 0, 5, 3, 1])
    turned = View(
        tuple(m[order] for m in view.made), tuple(g[order] for g in view.gains),
        tuple(Reading(r.columns[order], r.stats) for r in view.readings),
    )  # fmt: skip
    torch.testing.assert_close(score(turned), score(view)[order])


@pytest.mark.parametrize("name", NAMES)
def test_it_says_what_it_needs(name: str) -> None:
    needs = registry.constant("unitcriteria", name, "needs", None)
    assert isinstance(needs, frozenset)
    assert needs <= {"gram", "size", "gradient", "gain"}
