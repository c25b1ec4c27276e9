"""How much each unit of a group matters, by a criterion of whole units or of connections."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from penjing.calibrate import LayerStats
from penjing.coupling import Units
from penjing.errors import UsageError
from penjing.model import parent_of
from penjing.neurons import unit_scores
from penjing.registry import choices, constant, lookup
from penjing.steps._select import LEARNED
from penjing.unitcriteria._view import Reading, View

if TYPE_CHECKING:
    from penjing.steps._neurons import Consumer

__all__ = ["check", "importance", "is_absolute", "needs_of"]

# Takes the place of a criterion that a group has nothing for.
_PLAIN = "l2"


def check(criterion: str, module: nn.Module | None = None) -> None:
    """Refuse a criterion that is not there, or that a network has nothing for.

    Raises:
        UsageError: as said.
        InputError: a `file.py:function` that cannot be loaded.
    """
    if criterion == LEARNED:
        return
    if ":" in str(criterion):
        lookup("criteria", criterion, "score")
        return
    known = ("gram", *choices("unitcriteria"), *choices("criteria"))
    if criterion not in known:
        raise UsageError(
            "unknown name in criteria", got=repr(criterion), allowed=", ".join(dict.fromkeys(known))
        )
    scaled = module is None or any(isinstance(part, _BatchNorm) for part in module.modules())
    if "gain" in needs_of(criterion) and not scaled:
        raise UsageError(
            f"criterion {criterion} needs batch norms", got="a network without any",
            next="use l2, or gram, the default",
        )  # fmt: skip


def needs_of(criterion: str) -> frozenset[str]:
    """Statistics that it wants (`penjing.layerstats`); `gain` is a batch norm on the units."""
    plain = frozenset({"gram"})
    if criterion == "gram":
        return plain | {"fisher"}
    if criterion == LEARNED:
        return plain
    found: frozenset[str] = constant(_family(criterion), criterion, "needs", plain)
    return found


def is_absolute(criterion: str) -> bool:
    """Whether scores of different groups are in the same units."""
    return criterion != "gram" and bool(constant(_family(criterion), criterion, "absolute", False))


def _family(criterion: str) -> str:
    return "unitcriteria" if criterion in choices("unitcriteria") else "criteria"


def importance(
    criterion: str, module: nn.Module, group: Units, consumers: Sequence[Consumer],
    stats: Mapping[str, LayerStats],
) -> tuple[Tensor, str]:  # fmt: skip
    """Scores [units], larger means keep, and the name of the criterion that gave them.

    It is another one than asked for where the group has no batch norm to look at.

    Args:
        criterion: any but `gram`.
        module: the network.
        group: with whole names.
        consumers: of the layers that read it.
        stats: by path, with what the criterion needs.
    """
    if _family(criterion) == "criteria":
        score = lookup("criteria", criterion, "score")
        found = [score(c.matrix(module.get_submodule(c.path)), stats[c.path]) for c in consumers]
        return unit_scores(found, [c.columns for c in consumers]), criterion
    view = _view(module, group, consumers, stats)
    if "gain" in needs_of(criterion) and not view.gains:
        criterion = _PLAIN
    made: Tensor = lookup("unitcriteria", criterion, "score")(view)
    return made, criterion


def _view(
    module: nn.Module, group: Units, consumers: Sequence[Consumer], stats: Mapping[str, LayerStats]
) -> View:
    made: list[Tensor] = []
    single: list[Tensor] = []
    gains: list[Tensor] = []
    for member in group.members:
        holder, name = parent_of(module, member.name)
        if member.summed or name not in holder._parameters:
            continue
        own: Tensor = getattr(holder, name).detach().float()
        rows = own.movedim(member.dim, 0)[member.places].flatten(1)  # [units, weights]
        (made if own.ndim > 1 else single).append(rows)
        if isinstance(holder, _BatchNorm) and name == "weight":
            gains.append(rows)
    readings = tuple(Reading(one.columns, stats[one.path]) for one in consumers)
    return View(tuple(made or single), tuple(gains), readings)
