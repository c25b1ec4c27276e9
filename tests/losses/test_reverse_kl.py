import pytest
import torch
from scipy.special import rel_entr, softmax

from penjing.losses import reverse_kl


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_against_scipy(temperature: float) -> None:
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, 3, 4, 7, generator=generator) * 3
    p, q = (softmax(t.double().numpy() / temperature, axis=-1) for t in (teacher, student))
    wanted = rel_entr(q, p).sum(-1).mean() * temperature**2
    assert float(reverse_kl.loss(student, teacher, temperature)) == pytest.approx(wanted, rel=1e-5)
