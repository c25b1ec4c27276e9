import torch

from penjing.criteria import magnitude


def test_by_hand_without_data() -> None:
    assert magnitude.score(torch.tensor([[-3.0, 2.0, 0.0]])).tolist() == [[3.0, 2.0, 0.0]]
