import pytest
import torch

from penjing.losses import cosine


def test_by_hand() -> None:
    student = torch.tensor([[3.0, 0.0], [1.0, 1.0], [0.0, -2.0]])
    teacher = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    # Distances 0, 1 - 1 / sqrt 2, 2.
    assert float(cosine.loss(student, teacher)) == pytest.approx((3 - 0.5**0.5) / 3, rel=1e-6)


def test_zeros_count_as_one() -> None:
    assert float(cosine.loss(torch.zeros(1, 3), torch.ones(1, 3))) == pytest.approx(1)
