"""Sets of the tensors of one run, joined as operations pass something from one to another.

Union-find by identity. A set can be closed, with the reason why what it shares must stay as it is;
a set that is joined to a closed one is closed.
"""

from __future__ import annotations

from torch import Tensor

__all__ = ["TensorSets"]


class TensorSets:
    """Disjoint sets of tensors.

    Args:
        unseen: the reason for which a tensor is closed that nothing seen has made.
    """

    def __init__(self, unseen: str) -> None:
        self._unseen = unseen
        self._kept: list[Tensor] = []  # alive, so that an id is not used twice
        self._above: dict[int, int] = {}
        self._reasons: dict[int, str] = {}

    def new(self, tensor: Tensor) -> None:
        """What an operation that was seen has made; a set of its own, unless it is known."""
        if id(tensor) not in self._above:
            self._kept.append(tensor)
            self._above[id(tensor)] = id(tensor)

    def top(self, tensor: Tensor) -> int:
        """What stands for the set of a tensor, until it is joined to another."""
        key = id(tensor)
        if key not in self._above:
            self.new(tensor)
            self._reasons[key] = self._unseen
        while self._above[key] != key:
            key = self._above[key]
        return key

    def join(self, one: Tensor, other: Tensor) -> None:
        """Make one set of two."""
        first, second = self.top(one), self.top(other)
        self._above[second] = first
        if second in self._reasons:
            self._reasons.setdefault(first, self._reasons[second])

    def close(self, tensor: Tensor, reason: str) -> None:
        """The set stays as it is; the first reason counts."""
        self._reasons.setdefault(self.top(tensor), reason)

    def reason(self, top: int) -> str:
        """Why the set with this top is closed; empty when it is not."""
        return self._reasons.get(top, "")
