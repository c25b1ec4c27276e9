"""Labels: sets of whole arrays, against sets made by hand."""

from __future__ import annotations

import torch

from penjing.labels import Labels, narrowed


def _sets(own: Labels, labels: torch.Tensor) -> list[list[int]]:
    found: dict[int, list[int]] = {}
    for label, root in zip(labels.tolist(), own.roots(labels).tolist(), strict=True):
        found.setdefault(root, []).append(label)
    return sorted(found.values())


def test_joining_broadcasts() -> None:
    own = Labels()
    a, b = own.new(4), own.new(2)
    own.join(a.reshape(2, 2), b.reshape(2, 1), "")
    assert _sets(own, torch.cat([a, b])) == [[0, 1, 4], [2, 3, 5]]


def test_joining_agrees_with_a_search_for_connected_parts() -> None:
    generator = torch.Generator().manual_seed(3)
    own = Labels()
    labels = own.new(40)
    pairs = torch.randint(0, 40, (2, 25), generator=generator)
    own.join(pairs[0], pairs[1], "")
    near = torch.eye(40, dtype=torch.bool)
    near[pairs[0], pairs[1]] = near[pairs[1], pairs[0]] = True
    for _ in range(6):
        near = (near.float() @ near.float()) > 0
    roots = own.roots(labels)
    assert torch.equal(roots.unsqueeze(0) == roots.unsqueeze(1), near)


def test_what_meets_no_label_is_frozen_and_the_first_reason_stays() -> None:
    own = Labels()
    labels = own.new(3)
    own.join(labels, torch.tensor([-1, 1, 2]), "alone")
    assert [own.reason(k) for k in labels.tolist()] == ["alone", "", ""]
    own.freeze(labels[1:], "later")
    own.join(labels[:1], labels[1:2], "")
    assert own.reason(1) == "alone"
    assert own.reason(2) == "later"
    assert own.reason(-1) == ""


def test_tying_passes_over_what_has_no_label() -> None:
    own = Labels()
    labels = own.new(6).reshape(2, 3).clone()
    labels[0, 1] = -1
    own.tie(labels, 1)
    assert _sets(own, torch.arange(6)) == [[0, 2], [1], [3, 4, 5]]
    assert not own.reason(0)


def test_narrowed_keeps_an_axis_only_where_sets_change() -> None:
    own = Labels()
    labels = own.new(3)
    wide = labels.reshape(1, 3, 1).expand(2, 3, 4)
    found = narrowed(own, wide)
    assert found is not None
    assert found.shape == (1, 3, 1)
    assert found.flatten().tolist() == labels.tolist()
    bordered = wide.clone()
    bordered[:, :, 0] = -1  # a border of zeros
    found = narrowed(own, bordered)
    assert found is not None
    assert found.flatten().tolist() == labels.tolist()
    beside = torch.cat([labels, torch.full((2,), -1)])
    found = narrowed(own, beside)
    assert found is not None
    assert found.tolist() == [0, 1, 2, -1, -1]
    assert narrowed(own, torch.full((2, 2), -1)) is None
    own.join(labels, labels[:1], "")
    found = narrowed(own, labels)
    assert found is not None
    assert found.shape == (1,)


def test_labels_grow_in_steps() -> None:
    own = Labels()
    parts = [own.new(n) for n in (1, 5, 100, 3)]
    assert torch.equal(torch.cat(parts), torch.arange(109))
    assert torch.equal(own.roots(parts[-1]), parts[-1])


def test_many_joined_one_by_one_or_through_one_are_one() -> None:
    own = Labels()
    labels = own.new(500)
    own.freeze(labels[300:301], "why")
    own.join(labels[:-1:2], labels[1::2], "")
    assert own.reason(301) == "why"
    assert own.reason(302) == ""
    assert len(own.roots(labels).unique()) == 250
    own.join(labels.flip(0), labels[-1:], "")  # all meet the last
    assert len(own.roots(labels).unique()) == 1
    assert own.reason(7) == "why"
    chain = own.new(500)
    own.join(chain[1:].flip(0), chain[:-1].flip(0), "")
    assert len(own.roots(chain).unique()) == 1
    assert own.reason(int(chain[3])) == ""


def test_narrowed_takes_expanded_axes_at_once() -> None:
    own = Labels()
    labels = own.new(3).reshape(3, 1).expand(3, 1 << 40)  # far more than memory holds
    found = narrowed(own, labels)
    assert found is not None
    assert found.shape == (3, 1)
