"""Recipes in which what goes is learned: `constrain` chooses, the step after it takes it away."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from penjing.errors import UsageError
from penjing.recipe import Recipe
from penjing.steps._select import LEARNED
from penjing.steps.constrain import Constrain

__all__ = ["check_learned", "learning"]

_TAKEN_BY = {"weights": "prune", "neurons": "shrink", "layers": "cut"}


def check_learned(recipe: Recipe) -> None:
    """What is learned is used, and what is used was learned.

    Raises:
        UsageError: a step `constrain` without the one that takes away what it chose right after
            it, or that one alone.
    """
    waiting: str | None = None
    for step in recipe.steps:
        takes = getattr(step, "criterion", None) == LEARNED
        if waiting and not (takes and step.name == waiting):
            break
        if takes and not waiting:
            raise UsageError(
                f"{step.name} with the criterion {LEARNED}", next="put constrain before it"
            )
        waiting = _TAKEN_BY[step.of] if isinstance(step, Constrain) else None
    if waiting:
        raise UsageError(
            "what constrain chooses goes by the step after it",
            next=f"put {waiting} with the criterion {LEARNED} right after it",
        )


def learning(
    learn: str, of: str, budget: float, step: Any, seed: int, options: dict[str, Any], **more: Any
) -> Recipe:
    """A constraint that is learned, and `step`, which takes away what it chose.

    Args:
        learn: a name of `penjing.constraints`.
        options: what `constrain` has options for is taken out of them.
    """
    known = {field.name for field in fields(Constrain)}
    given = {name: options.pop(name) for name in list(options) if name in known}
    options.setdefault("samples", 512)
    return Recipe((Constrain(budget, of, method=learn, seed=seed, **given, **more), step), seed)
