import torch

from penjing.criteria import random


def test_the_scores_do_not_look_at_the_weight_or_the_global_seed() -> None:
    torch.manual_seed(1)
    first = random.score(torch.zeros(50, 40))
    torch.manual_seed(2)
    assert torch.equal(first, random.score(torch.ones(50, 40)))
    assert 0.45 < float(first.mean()) < 0.55
    assert len(first.unique()) > 1990
