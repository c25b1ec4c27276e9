import torch

from penjing.unitcriteria import bn_scale
from penjing.unitcriteria._view import View


def test_the_mean_of_the_norms_gains() -> None:
    first, second = torch.tensor([[-2.0], [0.0], [1.0]]), torch.tensor([[4.0], [0.5], [-1.0]])
    assert bn_scale.score(View((), (first,), ())).tolist() == [2.0, 0.0, 1.0]
    assert bn_scale.score(View((), (first, second), ())).tolist() == [3.0, 0.25, 1.0]
    wide = torch.tensor([[1.0, -3.0], [0.0, 0.0]])  # two channels a unit
    assert bn_scale.score(View((), (wide,), ())).tolist() == [2.0, 0.0]
