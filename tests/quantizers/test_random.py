import torch

from penjing.planes import Scheme
from penjing.quantizers import random


def test_codes_do_not_look_at_the_weight() -> None:
    planes = random.fit(torch.ones(40, 50), Scheme(3))
    other = random.fit(torch.randn(40, 50), Scheme(3))
    assert torch.equal(planes.codes, other.codes)
    assert planes.codes.unique().tolist() == list(range(8))
