from types import SimpleNamespace

import pytest
import torch

from penjing.criteria import taylor
from penjing.errors import InputError
from penjing.layerstats import Gradient

WEIGHT = torch.tensor([[-3.0, 2.0], [1.0, 0.5]])


def test_by_hand() -> None:
    size = torch.tensor([[2.0, 0.5], [0.0, 4.0]])
    stats = SimpleNamespace(gradient=Gradient(size, torch.full((2, 2), 9.0), torch.zeros(1, 2)))
    assert taylor.score(WEIGHT, stats).tolist() == [[6.0, 1.0], [0.0, 2.0]]


@pytest.mark.parametrize("stats", [None, SimpleNamespace(), SimpleNamespace(gradient=None)])
def test_without_data_it_says_so(stats: object) -> None:
    with pytest.raises(InputError, match=r"taylor needs gradients.*--data"):
        taylor.score(WEIGHT, stats)
