import pytest
import torch

from penjing.unitcriteria import l2
from penjing.unitcriteria._view import View


def test_by_hand() -> None:
    first = torch.tensor([[3.0, 4.0], [0.0, 5.0], [5.0, 5.0]])  # 25, 25, 50 of 100
    second = torch.tensor([[1.0], [3.0], [0.0]])  # 1, 9, 0 of 10
    assert l2.score(View((first,), (), ())).tolist() == [0.25, 0.25, 0.5]
    assert l2.score(View((first, second), (), ())).tolist() == pytest.approx([0.35, 1.15, 0.5])
