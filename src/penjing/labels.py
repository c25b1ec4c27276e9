"""Labels of channels, and which of them live or die together: union-find over whole arrays.

A label is a number of 0 or more; -1 stands for what no channel reaches. Labels that were joined
have one root. A root can be frozen, with the reason for which its channels must stay.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

__all__ = ["Labels", "narrowed"]


class Labels:
    """Disjoint sets of labels."""

    def __init__(self) -> None:
        self._above = np.full(1, -1)  # the last one is no label's: what -1 finds
        self._count = 0
        self._why: dict[int, str] = {}

    def new(self, count: int) -> Tensor:
        """Labels that nothing has, int64 [count]."""
        first, self._count = self._count, self._count + count
        if self._count >= len(self._above):
            more = np.arange(len(self._above) - 1, 2 * self._count)
            self._above = np.concatenate([self._above[:-1], more, [-1]])
        return torch.arange(first, self._count)

    def roots(self, labels: Tensor) -> Tensor:
        """What stands for each label's set, of the same shape; -1 for -1."""
        found = labels.numpy()
        now = self._above[found]
        while not np.array_equal(above := self._above[now], now):
            now = above
        self._above[found] = now  # shorter ways next time
        return torch.from_numpy(np.asarray(now))

    def join(self, one: Tensor, other: Tensor, reason: str) -> None:
        """Make one set of each pair of two arrays that broadcast.

        Args:
            reason: why a label is frozen that is paired with no label.
        """
        pair = torch.broadcast_tensors(self.roots(one), self.roots(other))  # type: ignore[no-untyped-call]
        count = self._count + 1
        keys = torch.unique((pair[0] + 1) * count + pair[1] + 1)
        first, second = (keys // count - 1).numpy(), (keys % count - 1).numpy()
        alone = (first < 0) ^ (second < 0)
        if alone.any():
            self.freeze(torch.from_numpy(np.maximum(first, second)[alone]), reason)
        both = (first >= 0) & (second >= 0)
        self._unite(first[both], second[both])

    def _unite(self, first: npt.NDArray[np.int64], second: npt.NDArray[np.int64]) -> None:
        """Roots go under the least that they meet, until none meets another."""
        gone: list[int] = []
        while (first != second).any():
            low, high = np.minimum(first, second), np.maximum(first, second)
            order = np.argsort(-low, kind="stable")
            order = order[(low != high)[order]]
            self._above[high[order]] = low[order]  # of several the last, which is the least
            gone += [root for root in np.unique(high[order]).tolist() if root in self._why]
            first, second = (self.roots(torch.from_numpy(x)).numpy() for x in (first, second))
        for root in gone:
            if root in self._why:
                self._why.setdefault(self._root(root), self._why[root])

    def tie(self, labels: Tensor, dim: int) -> None:
        """Make one set of all labels along an axis; what has no label there is passed over."""
        known = self.roots(labels)
        some = known.amax(dim, keepdim=True).expand_as(known)
        kept = known >= 0
        self.join(known[kept], some[kept], "")

    def freeze(self, labels: Tensor, reason: str) -> None:
        """Their sets stay as they are; the first reason counts."""
        for root in torch.unique(self.roots(labels)).tolist():
            if root >= 0:
                self._why.setdefault(root, reason)

    def reason(self, label: int) -> str:
        """Why the set of a label is frozen; empty when it is not."""
        return self._why.get(self._root(label), "") if label >= 0 else ""

    def _root(self, label: int) -> int:
        while (above := int(self._above[label])) != label:
            label = above
        return label


def narrowed(own: Labels, labels: Tensor) -> Tensor | None:
    """Labels with axes of length 1 where their sets do not change; None where there are none.

    Along an axis, what has no label goes with the one set that is there: a border of zeros lives
    and dies with its channel.
    """
    for dim in range(labels.ndim):
        if labels.shape[dim] > 1 and labels.stride(dim) == 0:
            labels = labels.narrow(dim, 0, 1)
    labels = _narrow(labels, labels)  # before their sets are looked up: most of it is alike
    roots = own.roots(labels)
    if not bool((roots >= 0).any()):
        return None
    return _narrow(labels, roots)


def _narrow(labels: Tensor, sets: Tensor) -> Tensor:
    for dim in range(labels.ndim):
        if labels.shape[dim] > 1:
            most = sets.amax(dim, keepdim=True)
            if bool(((sets == most) | (sets < 0)).all()):
                # The largest label of each is one of the set.
                labels, sets = labels.amax(dim, keepdim=True), most
    return labels
