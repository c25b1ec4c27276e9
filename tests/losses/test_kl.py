import pytest
import torch
from scipy.special import rel_entr, softmax

from penjing.losses import kl


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_against_scipy(temperature: float) -> None:
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, 3, 4, 7, generator=generator) * 3
    p, q = (softmax(t.double().numpy() / temperature, axis=-1) for t in (teacher, student))
    wanted = rel_entr(p, q).sum(-1).mean() * temperature**2
    assert float(kl.loss(student, teacher, temperature)) == pytest.approx(wanted, rel=1e-5)


def test_direction_by_hand() -> None:
    # Teacher certain of class 0, student at 1/2: log 2 nats.
    loss = kl.loss(torch.tensor([[0.0, 0.0]]), torch.tensor([[50.0, -50.0]]))
    assert float(loss) == pytest.approx(0.693147, abs=1e-5)
