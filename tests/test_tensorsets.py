import torch

from penjing.tensorsets import TensorSets


def test_joined_sets_are_one_and_closed_together() -> None:
    sets = TensorSets("unseen")
    a, b, c, d = (torch.zeros(2) for _ in range(4))
    for tensor in (a, b, c):
        sets.new(tensor)
    assert len({sets.top(x) for x in (a, b, c)}) == 3
    sets.join(a, b)
    assert sets.top(a) == sets.top(b) != sets.top(c)
    sets.close(b, "first")
    sets.close(a, "second")
    assert sets.reason(sets.top(a)) == "first"
    assert sets.reason(sets.top(c)) == ""
    sets.join(c, a)
    assert sets.reason(sets.top(c)) == "first"
    # Nothing that was seen has made it.
    assert sets.reason(sets.top(d)) == "unseen"


def test_making_a_known_tensor_again_keeps_its_set() -> None:
    sets = TensorSets("unseen")
    a, b = torch.zeros(1), torch.zeros(1)
    sets.new(a)
    sets.join(a, b)
    sets.new(b)
    assert sets.top(a) == sets.top(b)
    assert sets.reason(sets.top(a)) == "unseen"
