import math

import pytest
import torch
from scipy.spatial.distance import jensenshannon
from scipy.special import softmax

from penjing.losses import jsd


def test_against_scipy() -> None:
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, 12, 7, generator=generator) * 3
    p, q = (softmax(t.double().numpy() / 2, axis=-1) for t in (teacher, student))
    wanted = (jensenshannon(p, q, axis=-1) ** 2).mean() * 4
    assert float(jsd.loss(student, teacher, 2.0)) == pytest.approx(wanted, rel=1e-5)


def test_at_most_log_2() -> None:
    found = jsd.loss(torch.tensor([[-200.0, 200.0]]), torch.tensor([[200.0, -200.0]]))
    assert float(found) == pytest.approx(math.log(2), rel=1e-6)
