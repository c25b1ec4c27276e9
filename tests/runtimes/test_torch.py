import numpy as np
import pytest
import torch
from torch import nn

from penjing.errors import InputError
from penjing.model import Model, Source
from penjing.runtimes.torch import Session


def test_it_computes_what_numpy_computes_and_restores_threads() -> None:
    layer = nn.Linear(3, 2)
    model = Model(layer, "tensor", {"x": torch.zeros(1, 3)}, Source("factory", "tiny", "0"))
    session = Session(model, threads=1)
    assert session.inputs == {"x": (None, 3)}
    x = np.arange(12.0).reshape(4, 3)  # float64: cast to what the network takes
    threads = torch.get_num_threads()
    wanted = x @ layer.weight.detach().numpy().T + layer.bias.detach().numpy()
    assert np.allclose(session.run({"x": x}), wanted, atol=1e-5)
    assert torch.get_num_threads() == threads
    with pytest.raises(InputError, match="input x is missing"):
        session.run({})
