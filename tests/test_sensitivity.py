"""What is left in floats: from the input on, no more than fits, no more than helps."""

import numpy as np
import pytest
import torch
from torch import nn

from penjing.errors import UsageError
from penjing.model import Model, Source
from penjing.sensitivity import in_floats


class Chain(nn.Module):
    """Three layers of one size; what the second reads has one value a thousand times the rest."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.one, self.two, self.three = (nn.Linear(16, 16) for _ in range(3))
        with torch.no_grad():
            self.one.weight[0] *= 1000
            self.two.weight[:, 0] /= 1000

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.three(torch.relu(self.two(self.one(x))))


def _chain() -> tuple[Model, list[dict[str, torch.Tensor]]]:
    generator = torch.Generator().manual_seed(1)
    batches = [{"x": torch.randn(32, 16, generator=generator)} for _ in range(2)]
    return Model(Chain().eval(), "tensor", batches[0], Source("factory", "tiny", "0")), batches


def test_the_layers_up_to_the_outlier_are_left_and_no_more_than_fit() -> None:
    model, batches = _chain()
    before = {n: t.clone() for n, t in model.module.state_dict().items()}
    # All harm is at the second layer; the third is spared nothing worth its price.
    assert in_floats(model, batches, 1.0) == ("one", "two")
    assert in_floats(model, batches, 0.67) == ("one", "two")
    assert in_floats(model, batches, 0.34) == ("one",)
    assert in_floats(model, batches, 0.3) == ()  # each layer is a third of all there is
    assert in_floats(model, [], 0.0) == ()
    assert model.activations == {}
    for name, tensor in model.module.state_dict().items():
        np.testing.assert_array_equal(tensor, before[name])


def test_refusals() -> None:
    model, batches = _chain()
    with pytest.raises(UsageError, match="share"):
        in_floats(model, batches, 1.5)
    with pytest.raises(UsageError, match="data"):
        in_floats(model, [], 0.1)
