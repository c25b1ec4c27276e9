from types import SimpleNamespace

import pytest
import torch

from penjing.unitcriteria import activation
from penjing.unitcriteria._view import Reading, View


def test_by_hand() -> None:
    size = torch.tensor([1.0, 2.0, 4.0, 3.0])
    pairs = Reading(torch.tensor([[0, 2], [3, 1]]), SimpleNamespace(size=size))
    one = Reading(torch.tensor([[1], [0]]), SimpleNamespace(size=torch.tensor([1.0, 3.0])))
    assert activation.score(View((), (), (pairs,))).tolist() == [0.5, 0.5]
    assert activation.score(View((), (), (pairs, one))).tolist() == pytest.approx([1.25, 0.75])
