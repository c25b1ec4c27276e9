from types import SimpleNamespace

import pytest
import torch

from penjing.errors import InputError
from penjing.layerstats import Gradient
from penjing.unitcriteria import fisher, taylor
from penjing.unitcriteria._view import Reading, View

NONE = torch.zeros(1, 1)


def view() -> View:
    """Two samples, two units: the first reader has two inputs of each, the second one."""
    pairs = torch.tensor([[1.0, 2.0, -4.0, 0.0], [0.0, -1.0, 1.0, 2.0]])
    ones = torch.tensor([[3.0, 1.0], [-2.0, 0.5]])
    columns = torch.tensor([[0, 2], [1, 3]]), torch.tensor([[0], [1]])
    return View((), (), tuple(
        Reading(places, SimpleNamespace(gradient=Gradient(NONE, NONE, effects)))
        for places, effects in zip(columns, (pairs, ones), strict=True)
    ))  # fmt: skip


# Of the first sample (1 - 4) + 3 = 0 and (2 + 0) + 1 = 3, of the second -1 and 1.5.


def test_taylor_by_hand() -> None:
    assert taylor.score(view()).tolist() == [0.5, 2.25]


def test_fisher_by_hand() -> None:
    assert fisher.score(view()).tolist() == [0.25, (9 + 2.25) / 4]


@pytest.mark.parametrize("leaf", [taylor, fisher])
def test_without_gradients_it_says_so(leaf: object) -> None:
    with pytest.raises(InputError, match="needs gradients"):
        leaf.score(View((), (), (Reading(torch.zeros(1, 1).long(), SimpleNamespace()),)))
