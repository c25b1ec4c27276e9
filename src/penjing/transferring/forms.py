"""Forms of a network whose units, halves of blocks or blocks are gone: to count, to time, to make.

A form has its weights as they come; the recipe of the same options makes what is fitted.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import torch

from penjing.calibrate import Stream
from penjing.channelmap import channel_map
from penjing.edits import perform
from penjing.errors import InputError
from penjing.model import Batch, Model
from penjing.recipe import Edit, Patch, Recipe
from penjing.steps._halves import Half, halves_of
from penjing.steps._ladder import Forms as Narrow
from penjing.steps._trials import runs
from penjing.steps.cut import Cut
from penjing.steps.shrink import Shrink

__all__ = ["BLOCK", "Forms", "Option", "Picked"]

BLOCK = "block"
_HALVES = ("attention", "mlp")


@dataclass(frozen=True)
class Option:
    """What can become of a block, or of a group of units that several blocks share.

    Attributes:
        kept: units that stay, by group; others stay whole.
        gone: what leaves: `block`, or `attention`, `mlp` or both.
        harm: divergence of the outputs with this alone.
        cost: what the network costs with this alone, over the whole, less 1.
    """

    kept: tuple[tuple[str, int], ...] = ()
    gone: tuple[str, ...] = ()
    harm: float = 0.0
    cost: float = 0.0

    def __add__(self, other: Option) -> Option:
        return Option(self.kept + other.kept, self.gone + other.gone, self.harm + other.harm,
                      self.cost + other.cost)  # fmt: skip


# By name of a block or of a group.
Picked = Mapping[str, Option]


@dataclass(eq=False)
class Forms:
    """Of one network, which stays as it is.

    Args:
        model: the network.
        sample: a batch, to see how its blocks hang together.
        measure: what a network costs, over `model`.
    """

    model: Model
    sample: Batch
    measure: Callable[[Model], float]
    halves: dict[str, dict[str, Half]] = field(default_factory=dict)
    _width: int = 0  # of hidden states that a patch can map
    _known: dict[object, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._narrow = Narrow(self.model, channel_map(self.model).free)
        if not self.model.blocks:
            return
        for _, block, calls, outputs in Stream(self.model, [self.sample]).walk():
            path = self.model.blocks[len(self.halves)]
            plain = outputs[0].ndim == 3 and outputs[0].shape == calls[0].hidden.shape
            found = halves_of(block, calls[0]) if plain else {}
            self.halves[path] = {str(name): half for name, half in found.items()}
            self._width = outputs[0].shape[2] if plain else self._width

    def form(self, picked: Picked) -> Model:
        """The network of that shape."""
        made = self._narrow.form(dict(pair for one in picked.values() for pair in one.kept))
        blocks = self.model.blocks
        for name, option in picked.items():
            for half in option.gone if option.gone != (BLOCK,) else ():
                for path, left in self.halves[name][half].parts:
                    perform(made, Edit("drop", f"{name}.{path}", left, ""))
        gone = frozenset(i for i, b in enumerate(blocks) if BLOCK in _of(picked, b).gone)
        for first, last in runs(gone) if self._width else ():
            stays = [i for i in range(len(blocks)) if i not in gone]
            behind = last + 1 < len(blocks)
            near = last + 1 if behind else max(i for i in stays if i < first)
            patch = Patch(torch.eye(self._width), torch.zeros(self._width),
                          "before" if behind else "after")  # fmt: skip
            perform(made, Edit("patch", blocks[near], patch, ""))
        for index in sorted(gone, reverse=True):
            perform(made, Edit("drop", blocks[index], None, ""))
        return made

    def works(self, picked: Picked) -> bool:
        """Whether the form runs, and gives outputs of the same shape."""
        example = self.model.example
        try:
            with torch.no_grad():
                return self.form(picked).run(example).shape == self.model.run(example).shape
        except (InputError, RuntimeError):
            return False

    def priced(self, name: str, option: Option) -> Option:
        """The same with its cost, measured once for all blocks of one shape.

        In all of them at once, so that what is timed is more than the noise; of a list of blocks
        one stays.
        """
        if not option.kept and not option.gone:
            return option
        twins = self._twins(name)
        plain = {twin: _renamed(option, name, twin) for twin in twins}
        known = {free.group.name for free in self._narrow.groups}
        if any(group not in known for one in plain.values() for group, _ in one.kept):
            plain = {name: option}
        if BLOCK in option.gone:
            for place in {_place(twin) for twin in twins}:
                own = [b for b in self.model.blocks if _place(b) == place]
                if set(own) <= set(plain):
                    plain.pop(own[0])
        key = (twins[0], _renamed(option, name, twins[0]))
        if key not in self._known:
            self._known[key] = min(0.0, (self.measure(self.form(plain)) - 1) / len(plain))
        return replace(option, cost=self._known[key])

    def _twins(self, name: str) -> list[str]:
        """Blocks of the same shape, with itself."""
        if name not in self.model.blocks:
            return [name]
        return [b for b in self.model.blocks if self._shape(b) == self._shape(name)]

    def _shape(self, block: str) -> list[tuple[str, torch.Size]]:
        named = self.model.module.get_submodule(block).named_parameters()
        return [(path, value.shape) for path, value in named]

    def recipe(self, picked: Picked, seed: int = 0) -> Recipe:
        """What makes it: units, then halves, then blocks, while all have their old numbers."""
        kept = dict(pair for option in picked.values() for pair in option.kept)
        steps: list[Shrink | Cut] = [Shrink(kept=kept)] if kept else []
        for part in (*_HALVES, BLOCK):
            gone = tuple(name for name, option in picked.items() if part in option.gone)
            if gone:
                steps.append(Cut(blocks=gone, part=part, refit=part != BLOCK))
        return Recipe(tuple(steps), seed)


def _of(picked: Picked, name: str) -> Option:
    return picked.get(name, Option())


def _place(block: str) -> str:
    """The list that a block is in."""
    return block.rpartition(".")[0]


def _renamed(option: Option, name: str, twin: str) -> Option:
    kept = tuple((twin + group.removeprefix(name), count) for group, count in option.kept)
    return Option(kept, option.gone)
