"""Variants: a network with a few edits, made and run at the cost of what the edits touch.

A variant shares every tensor that its edits leave alone. Where the blocks form a chain, it is
run from the first edited block on: the blocks before it hand over the hidden state that the
unedited network has there, which is the same to the last bit.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import Tensor, nn

from penjing.calibrate import Stream, Unit
from penjing.edits import perform
from penjing.graph import is_weighted
from penjing.model import Batch, Model
from penjing.recipe import Edit

__all__ = ["Suffixes", "variant"]


def variant(base: Model, edits: Sequence[Edit]) -> Model:
    """A copy of `base` with `edits`; it shares the tensors of all that no edit names.

    For reading only: to write into a shared tensor would change `base`.

    Raises:
        InputError: an edit that does not fit.
    """
    paths = [e.path for e in edits]
    named = list(base.module.named_parameters(remove_duplicate=False))
    # By identity: a tied tensor is copied once, whichever of its names is edited.
    touched = {id(t) for name, t in named if any(_within(name, p) for p in paths)}
    tensors = [t for _, t in named] + [t for _, t in base.module.named_buffers()]
    kept: dict[int, Any] = {id(t): t for t in tensors if id(t) not in touched}
    twin = copy.copy(base)
    twin.module = copy.deepcopy(base.module, kept)
    twin.masks, twin.planes = dict(base.masks), dict(base.planes)
    twin.activations, twin.outputs = dict(base.activations), dict(base.outputs)
    twin.structure = list(base.structure)
    for edit in edits:
        perform(twin, edit)
    return twin


class Suffixes:
    """Runs variants of `base` on `batches`, each from its first edited block on.

    Args:
        base: the unedited network; it must stay so.
        batches: what outputs are wanted of.
    """

    def __init__(self, base: Model, batches: Sequence[Batch]) -> None:
        self.base, self.batches = base, list(batches)
        self._stream = Stream(base, batches)
        self._late = {
            n
            for n, m in base.module.named_modules()
            if is_weighted(m)
            and n not in self._stream.front
            and not any(_within(n, b) for b in base.blocks)
        }
        self._extras = _extras(base, self.batches[0]) if self._stream.chained else None
        self._hidden: dict[int, list[Tensor]] = {}  # inputs of a block, by its number

    @property
    def exact(self) -> bool:
        """Whether earlier blocks can be skipped: a chain, of blocks that give nothing else."""
        return self._extras is not None

    def enter(self, unit: Unit) -> None:
        """Get ready for edits of a block or of what follows the blocks; only forward."""
        if not self.exact or (unit.index is None and unit.name != "back"):
            return
        count = len(self.base.blocks)
        index = count if unit.index is None else unit.index
        self._stream.enter(min(index, count - 1))
        if index == count:
            last = self.base.module.get_submodule(self.base.blocks[-1])
            new = list(self._stream.run(last))
        else:
            new = [call.hidden for call in self._stream.calls()]
        # The block before stays: a patch behind the last block sits in it.
        self._hidden = {k: v for k, v in self._hidden.items() if k == index - 1} | {index: new}

    def first(self, edits: Sequence[Edit]) -> int:
        """Number of the first block whose output `edits` can change; 0 if they are before it."""
        blocks = self.base.blocks
        numbers = []
        for edit in edits:
            inside = [i for i, b in enumerate(blocks) if _within(edit.path, b)]
            numbers.append(inside[0] if inside else self._outside(edit.path))
        return min(numbers, default=len(blocks))

    def _outside(self, path: str) -> int:
        """Behind the blocks, where the edited tensors are only of layers that run there."""
        own = {id(t) for n, t in self._named() if _within(n, path)}
        names = [n for n, t in self._named() if id(t) in own]
        late = bool(names) and all(n.rpartition(".")[0] in self._late for n in names)
        return len(self.base.blocks) if late else 0

    def _named(self) -> list[tuple[str, nn.Parameter]]:
        return list(self.base.module.named_parameters(remove_duplicate=False))

    def outputs(self, edited: Model, edits: Sequence[Edit]) -> Iterator[Tensor]:
        """The outputs of `edited`, which is `base` with `edits`, one a batch.

        Changes `edited`: its skipped blocks only pass on.
        """
        first = self.first(edits) if self.exact else 0
        start = max((k for k in self._hidden if k <= first), default=0)
        now: list[Tensor] = []
        for path, extra in zip(self.base.blocks[:start], self._extras or (), strict=False):
            block = edited.module.get_submodule(path)
            # A patch that the base has already is in the cached state.
            block._forward_hooks.clear()
            block._forward_pre_hooks.clear()
            block.forward = _passing(now, extra)
        for number, batch in enumerate(self.batches):
            now[:] = [self._hidden[start][number]] if start else []
            yield edited.run(batch)


def _passing(now: list[Tensor], extra: int | None) -> Callable[..., Any]:
    def forward(*_: Any, **__: Any) -> Any:
        return now[0] if extra is None else (now[0], *[None] * extra)

    return forward


def _extras(model: Model, batch: Batch) -> list[int | None] | None:
    """For every block how many Nones follow the hidden state, None for a bare tensor.

    None altogether where a block gives something else as well.
    """
    found: list[int | None] = []
    plain = True

    def see(_: nn.Module, args: Any, output: Any) -> None:
        nonlocal plain
        if isinstance(output, tuple):
            plain = plain and all(part is None for part in output[1:])
            found.append(len(output) - 1)
        else:
            plain = plain and isinstance(output, Tensor)
            found.append(None)

    handles = [model.module.get_submodule(b).register_forward_hook(see) for b in model.blocks]
    try:
        model.run(batch)
    finally:
        for handle in handles:
            handle.remove()
    return found if plain and len(found) == len(model.blocks) else None


def _within(path: str, prefix: str) -> bool:
    return path == prefix or path.startswith(f"{prefix}.")
