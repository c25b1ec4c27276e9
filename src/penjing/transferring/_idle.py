"""A block that does nothing yet: as few of its last layers at zero as make it the identity."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from penjing.calls import Call, record
from penjing.model import Model

__all__ = ["idle"]


@torch.no_grad()
def idle(model: Model, path: str) -> bool:
    """Whether the block at `path` was made to give what it gets; it stays as it is where not.

    Normalization behind the sum (BERT's) lets no block be the identity.
    """
    block = model.module.get_submodule(path)
    call, layers = _seen(model, block)
    if call is None:
        return False
    held = {name: {n: p.clone() for n, p in layer.named_parameters(recurse=False)}
            for name, layer in layers.items()}  # fmt: skip

    def still() -> bool:
        found = call.run(block, call.hidden)
        same = found.shape == call.hidden.shape
        return same and torch.allclose(found, call.hidden, rtol=1e-5, atol=1e-6)

    for layer in layers.values():
        _set(layer, None)
    silent = still()
    for name, layer in layers.items():
        _set(layer, held[name])
        if silent and not still():
            _set(layer, None)
    return silent


def _set(layer: nn.Module, values: dict[str, Tensor] | None) -> None:
    for name, own in layer.named_parameters(recurse=False):
        if values is None:
            own.zero_()
        else:
            own.copy_(values[name])


def _seen(model: Model, block: nn.Module) -> tuple[Call | None, dict[str, nn.Module]]:
    """The call of a block on the example, and its layers in the order they run."""
    calls: list[Call] = []
    order: dict[str, nn.Module] = {}

    def enter(_: nn.Module, args: Any, kwargs: Any) -> None:
        calls.append(record(args, kwargs))

    def note(layer: nn.Module, *_: Any, name: str) -> None:
        order.setdefault(name, layer)

    handles = [block.register_forward_pre_hook(enter, with_kwargs=True)]
    handles += [
        layer.register_forward_pre_hook(partial(note, name=name))
        for name, layer in block.named_modules()
        if any(True for _ in layer.parameters(recurse=False))
    ]
    try:
        model.run(model.example)
    finally:
        for handle in handles:
            handle.remove()
    return (calls[0] if calls else None), order
