"""Proof that units can leave a network: smaller, it gives what it gives with them silenced.

Silenced are units whose readers have zeros in their place. The zeros are put in while the network
runs, one parameter at a time, so that the proof of a large network takes little memory.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from penjing.coupling import Plan, remove, unread, zeroed
from penjing.model import parent_of
from penjing.recipe import Setting
from penjing.shapes import fresh, settings

__all__ = ["PROOF", "Run", "inside", "prove", "tensors_of"]

Run = Callable[[nn.Module], Any]

# Largest difference of what is equal, in float64 with some operations in float32.
PROOF = 1e-5


class _Silenced(TorchDispatchMode):
    """Operations see parameters with zeros where they read what is not kept."""

    def __init__(self, module: nn.Module, plans: Sequence[Plan]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._zeros = {}
        for path, places in unread(plans).items():
            holder, name = parent_of(module, path)
            self._zeros[id(getattr(holder, name))] = places

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = tree_map_only(Tensor, self._seen, (args, kwargs or {}))
        return func(*args, **kwargs)

    def _seen(self, tensor: Tensor) -> Tensor:
        places = self._zeros.get(id(tensor))
        return tensor if places is None else zeroed(tensor.detach(), places)


def prove(
    module: nn.Module,
    run: Run,
    plans: Sequence[Plan],
    known: Sequence[Setting] | None = None,
    most: float = PROOF,
    plain: list[Tensor] | None = None,
) -> tuple[float, list[Setting]]:
    """Difference of the silenced and the smaller network, and the attributes that had to change.

    Args:
        module: in evaluation mode; is as before afterwards. `drawn` makes one that shows most.
        run: gives outputs of the module, the same when nothing has changed.
        plans: what goes, together.
        known: attributes to set; None to look for them, for a single group.
        most: a difference at which the search for attributes ends.
        plain: `tensors_of` the outputs with nothing changed, where they are known.

    Returns:
        The largest difference relative to what silencing changes, infinite where the smaller one
        does not run.
    """
    if plain is None:
        plain = tensors_of(run(fresh(module)))
    with _Silenced(module, plans):
        wanted = tensors_of(run(fresh(module)))
    sizes = _changes(wanted, plain)
    least: tuple[float, list[Setting]] = (float("inf"), [])
    for own in _settings(module, plans) if known is None else [list(known)]:
        with _preserved(module):
            try:
                remove(module, plans, own)
                found = tensors_of(run(fresh(module)))
            except (RuntimeError, ValueError, IndexError, AssertionError, KeyError):
                continue  # shapes do not fit: something else holds the width
        off = _difference(found, wanted, sizes)
        if off < least[0]:
            least = off, own
        if off <= most:
            break
    return least


def inside(module: nn.Module, run: Run, paths: Sequence[str]) -> dict[str, Run]:
    """Runs of some submodules alone, on all inputs that they have in one run of the whole.

    Those that are not called have none.
    """
    calls: dict[str, list[Any]] = {path: [] for path in paths}

    def note(path: str) -> Any:
        return lambda own, args, kwargs: calls[path].append(copy.deepcopy((args, kwargs)))

    handles = [module.get_submodule(path).register_forward_pre_hook(note(path), with_kwargs=True)
               for path in paths]  # fmt: skip
    try:
        run(fresh(module))
    finally:
        for handle in handles:
            handle.remove()

    def again(found: list[Any]) -> Run:
        def once(own: nn.Module) -> list[Any]:
            made = []
            for args, kwargs in copy.deepcopy(found):
                torch.manual_seed(0)
                with torch.no_grad():
                    made.append(own(*args, **kwargs))
            return made

        return once

    return {path: again(found) for path, found in calls.items() if found}


def tensors_of(output: Any) -> list[Tensor]:
    """All tensors of an output."""
    with torch.no_grad():
        return [x.detach() for x in tree_leaves(output) if isinstance(x, Tensor)]


def _settings(module: nn.Module, plans: Sequence[Plan]) -> Iterator[list[Setting]]:
    ((group, kept),) = plans
    yield from settings(module, [m.name for m in group.members], group.count, len(set(kept)))


@contextmanager
def _preserved(module: nn.Module) -> Iterator[None]:
    """Parameters, buffers and attributes are afterwards what they were."""
    kept = [
        ({k: list(v) if type(v) is list else v for k, v in vars(own).items()},
         dict(own._parameters), dict(own._buffers), own)
        for own in module.modules()
    ]  # fmt: skip
    try:
        yield
    finally:
        for state, parameters, buffers, own in kept:
            vars(own).clear()
            vars(own).update(state)
            own._parameters.clear()
            own._parameters.update(parameters)
            own._buffers.clear()
            own._buffers.update(buffers)


def _changes(silenced: list[Tensor], plain: list[Tensor]) -> list[float]:
    """The largest difference that silencing makes; where shapes change with it, all there is."""
    if [x.shape for x in silenced] == [x.shape for x in plain]:
        silenced = [a - b if a.is_floating_point() else a
                    for a, b in zip(silenced, plain, strict=True)]  # fmt: skip
    return [_most(x) for x in silenced]


def _most(x: Tensor) -> float:
    return float(x.abs().max()) if x.is_floating_point() and x.numel() else 0.0


def _difference(found: list[Tensor], wanted: list[Tensor], sizes: list[float]) -> float:
    """The largest difference over what silencing changed; of what it did not, over the output."""
    if [x.shape for x in found] != [x.shape for x in wanted]:
        return 1.0  # something else altogether
    worst = 0.0
    for one, other, size in zip(found, wanted, sizes, strict=True):
        if one.is_floating_point() and one.numel():
            off = _most(one - other) / max(size, 1e-6 * _most(other), 1e-30)
            worst = max(worst, off if off == off else float("inf"))
    return worst
