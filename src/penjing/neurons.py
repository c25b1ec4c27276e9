"""Which neurons to keep: greedy optimal brain surgeon on the Gram matrices of what reads them.

Removing inputs g of a consumer W with Gram matrix H, and refitting the rest, costs
    trace(W_g ([H^-1]_gg)^-1 W_g^T)
(Hassibi and Stork 1993, for groups: ZipLM, Kurtic et al., NeurIPS 2023, section 3). The
cheapest group goes, W and H^-1 are updated, and so on; the updated W is the least-squares
refit. Of many units a thirtieth go at a time. With the Fisher information F of a consumer's
outputs (`penjing.gradients`) W counts as F^(1/2) W, and half of the cost is what the loss of the
whole network rises by, in nats. Without it, where several layers read the units, each counts by
the share of its output that is lost.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from penjing.linalg import damped_cholesky

# Added to F, of its mean diagonal: it is the mean over a sample.
_NOISE = 0.1

__all__ = ["Reader", "by_scores", "greedy_obs", "largest", "removal_order", "unit_scores"]


@dataclass(frozen=True, eq=False)
class Reader:
    """A layer that reads the units.

    Attributes:
        weight: [out, in].
        gram: [in, in] of its inputs.
        columns: int64 [units, size], inputs of each unit.
        fisher: [out, out] of its outputs.
    """

    weight: Tensor
    gram: Tensor
    columns: Tensor
    fisher: Tensor | None = None


class _State:
    """A reader while units go.

    Args:
        reader: the layer.
        damping: of its Gram matrix.
        nats: costs are of the loss; else shares of its output.
    """

    def __init__(self, reader: Reader, damping: float, *, nats: bool) -> None:
        gram = reader.gram.double()
        self.inverse = torch.cholesky_inverse(damped_cholesky(gram, damping))  # [in, in]
        self.weight = reader.weight.double().clone()
        self.columns = reader.columns
        self.root: Tensor | None = None
        if nats:
            assert reader.fisher is not None
            self.root = damped_cholesky(reader.fisher.double(), _NOISE).T
            self.weight, self.unit = self.root @ self.weight, 2.0
        else:
            whole = float(((self.weight @ gram) * self.weight).sum())
            self.unit = whole if whole > 0 else 1.0

    @property
    def fitted(self) -> Tensor:
        """Its weight, float32 [out, in]."""
        made = self.weight
        if self.root is not None:
            made = torch.linalg.solve_triangular(self.root, made, upper=True)
        return made.float()

    def cost(self, left: Tensor) -> Tensor:
        """Of each unit that is left, [left]."""
        index = self.columns[left]  # [left, size]
        if index.shape[1] == 1:
            own = index[:, 0]
            found = self.weight[:, own].square().sum(0) / self.inverse[own, own]
        else:
            blocks = self.inverse[index.unsqueeze(-1), index.unsqueeze(-2)]
            part = self.weight[:, index].permute(1, 2, 0)  # [left, size, out]
            found = (part * torch.linalg.solve(blocks, part)).sum((1, 2))
        return found / self.unit

    def drop(self, units: Tensor) -> None:
        gone = self.columns[units].flatten()
        step = torch.linalg.solve(self.inverse[gone][:, gone], self.inverse[gone])  # [gone, in]
        self.weight -= self.weight[:, gone] @ step
        self.inverse -= self.inverse[:, gone] @ step
        # Exact zeros: rounding must not bring a removed input back.
        self.weight[:, gone] = 0
        self.inverse[gone], self.inverse[:, gone] = 0.0, 0.0
        self.inverse[gone, gone] = 1.0


def greedy_obs(
    readers: Sequence[Reader], keep: int, damping: float = 0.01, costs: list[Tensor] | None = None
) -> tuple[list[int], list[Tensor]]:
    """Remove units one by one until `keep` are left.

    Args:
        readers: at least one; all of the same number of units.
        keep: units that stay, at least 1.
        costs: gets that of each unit that goes, in their order, when it goes; in nats where all
            readers have their Fisher information, else in shares.

    Returns:
        Kept unit numbers, ascending, and each reader's refitted weight [out, in], zero where it
        read what is gone.
    """
    states = _states(readers, damping)
    _, alive, found = _remove(states, len(readers[0].columns), keep)
    if costs is not None:
        costs.append(found)
    return alive.tolist(), [state.fitted for state in states]


def removal_order(readers: Sequence[Reader], damping: float = 0.01) -> list[int]:
    """All units in the order in which `greedy_obs` removes them; the dearest are last."""
    states = _states(readers, damping)
    gone, alive, _ = _remove(states, len(readers[0].columns), 1)
    return [*gone.tolist(), *alive.tolist()]


def _states(readers: Sequence[Reader], damping: float) -> list[_State]:
    nats = all(reader.fisher is not None for reader in readers)
    return [_State(reader, damping, nats=nats) for reader in readers]


def _remove(states: Sequence[_State], count: int, keep: int) -> tuple[Tensor, Tensor, Tensor]:
    """Units in the order they go, those that stay, and what each cost that went."""
    alive = torch.ones(count, dtype=torch.bool)
    gone = [torch.empty(0, dtype=torch.long)]
    costs = [torch.empty(0, dtype=torch.float64)]
    # The order inside 3 % hardly matters, the time does.
    stride = max(1, count // 32)
    while int(alive.sum()) > keep:
        left = alive.nonzero().flatten()
        cost = torch.stack([state.cost(left) for state in states]).sum(0)
        several = min(stride, int(alive.sum()) - keep)
        order = torch.sort(cost, stable=True).indices[:several]
        chosen = left[order]
        costs.append(cost[order])
        for state in states:
            state.drop(chosen)
        alive[chosen] = False
        gone.append(chosen)
    return torch.cat(gone), alive.nonzero().flatten(), torch.cat(costs)


def by_scores(scores: Sequence[Tensor], columns: Sequence[Tensor], keep: int) -> list[int]:
    """The `keep` units with the largest sum of squared scores, ascending.

    Args:
        scores: [out, in] of each layer that reads them.
        columns: int64 [units, size] of each, inputs of each unit.
    """
    return largest(unit_scores(scores, columns), keep)


def unit_scores(scores: Sequence[Tensor], columns: Sequence[Tensor]) -> Tensor:
    """[units] float64, sums of squared scores, as shares of each layer's; see `by_scores`."""
    total = torch.zeros(len(columns[0]), dtype=torch.float64)
    for own, index in zip(scores, columns, strict=True):
        power = own.double().square()
        power = power.sum(0) / power.sum().clamp_min(1e-30)  # [in]
        total += power[index].sum(1)
    return total


def largest(scores: Tensor, keep: int) -> list[int]:
    """The `keep` units with the largest scores [units], ascending."""
    order = torch.sort(scores, descending=True, stable=True).indices
    return sorted(order[:keep].tolist())
