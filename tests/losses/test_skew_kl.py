import math

import pytest
import torch
from scipy.special import rel_entr, softmax

from penjing.losses import skew_kl


@pytest.mark.parametrize("skew", [0.1, 0.7])
def test_against_scipy(skew: float) -> None:
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, 3, 4, 7, generator=generator) * 3
    p, q = (softmax(t.double().numpy() / 2, axis=-1) for t in (teacher, student))
    wanted = rel_entr(p, skew * p + (1 - skew) * q).sum(-1).mean() * 4
    assert float(skew_kl.loss(student, teacher, 2.0, skew)) == pytest.approx(wanted, rel=1e-5)


def test_bounded_where_the_student_has_nothing() -> None:
    found = skew_kl.loss(torch.tensor([[-200.0, 200.0]]), torch.tensor([[200.0, -200.0]]))
    assert float(found) == pytest.approx(-math.log(0.1), rel=1e-6)
