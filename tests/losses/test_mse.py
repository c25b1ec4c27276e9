import torch

from penjing.losses import mse


def test_by_hand() -> None:
    assert float(mse.loss(torch.tensor([[1.0, 2.0]]), torch.tensor([[0.0, 5.0]]))) == 5.0
