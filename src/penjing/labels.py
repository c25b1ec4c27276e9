"""Labels of channels, and which of them live or die together: union-find over whole arrays.

A label is a number of 0 or more; -1 stands for what no channel reaches. Labels that were joined
have one root. A root can be frozen, with the reason for which its channels must stay.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

__all__ = ["Labels", "narrowed"]


class Labels:
    """Disjoint sets of labels."""

    def __init__(self) -> None:
        self._above = np.empty(0, dtype=np.int64)
        self._count = 0
        self._why: dict[int, str] = {}

    def new(self, count: int) -> Tensor:
        """Labels that nothing has, int64 [count]."""
        first, self._count = self._count, self._count + count
        if self._count > len(self._above):
            more = np.arange(len(self._above), 2 * self._count, dtype=np.int64)
            self._above = np.concatenate([self._above, more])
        return torch.arange(first, self._count)

    def roots(self, labels: Tensor) -> Tensor:
        """What stands for each label's set, of the same shape; -1 for -1."""
        found = labels.numpy()
        known = found >= 0
        now = found[known]
        while True:
            above = self._above[now]
            if (above == now).all():
                break
            now = above
        self._above[found[known]] = now  # shorter ways next time
        result = np.full(found.shape, -1, dtype=np.int64)
        result[known] = now
        return torch.from_numpy(result)

    def join(self, one: Tensor, other: Tensor, reason: str) -> None:
        """Make one set of each pair of two arrays that broadcast.

        Args:
            reason: why a label is frozen that is paired with no label.
        """
        pair = torch.broadcast_tensors(self.roots(one), self.roots(other))  # type: ignore[no-untyped-call]
        pairs = torch.unique(torch.stack([x.reshape(-1) for x in pair]), dim=1)  # [2, pairs]
        first, second = pairs
        alone = (first < 0) ^ (second < 0)
        if bool(alone.any()):
            self.freeze(torch.maximum(first, second)[alone], reason)
        both = (first >= 0) & (second >= 0) & (first != second)
        for a, b in pairs[:, both].T.tolist():
            a, b = self._root(a), self._root(b)
            if a == b:
                continue
            self._above[b] = a
            if b in self._why:
                self._why.setdefault(a, self._why.pop(b))

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
    roots = own.roots(labels)
    if not bool((roots >= 0).any()):
        return None
    for dim in range(labels.ndim):
        if labels.shape[dim] > 1:
            most = roots.amax(dim, keepdim=True)
            if bool(((roots == most) | (roots < 0)).all()):
                labels, roots = labels.amax(dim, keepdim=True), most
    return labels
