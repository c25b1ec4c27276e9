from types import SimpleNamespace

import pytest
import torch

from penjing.criteria import wanda
from penjing.errors import InputError

WEIGHT = torch.tensor([[-3.0, 2.0], [1.0, 0.5]])


def test_by_hand() -> None:
    stats = SimpleNamespace(norm=torch.tensor([1.0, 4.0]), gram=None)
    assert wanda.score(WEIGHT, stats).tolist() == [[3.0, 8.0], [1.0, 2.0]]


def test_the_norm_is_the_root_of_the_grams_diagonal() -> None:
    stats = SimpleNamespace(norm=None, gram=torch.tensor([[1.0, 9], [9, 16]]).double())
    assert wanda.score(WEIGHT, stats).tolist() == [[3.0, 8.0], [1.0, 2.0]]


@pytest.mark.parametrize("stats", [None, SimpleNamespace(), SimpleNamespace(norm=None, gram=None)])
def test_without_data_it_says_so(stats: object) -> None:
    with pytest.raises(InputError, match=r"wanda needs calibration data.*--data"):
        wanda.score(WEIGHT, stats)


def test_another_width_is_refused() -> None:
    with pytest.raises(InputError, match="norm of the inputs"):
        wanda.score(WEIGHT, SimpleNamespace(norm=torch.ones(3)))
