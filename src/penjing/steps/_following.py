"""Convolutions that one other layer alone reads, found by running the network.

Two layers are a pair where the second's input is the very tensor that the first gave, and nothing
else looks at that tensor.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from penjing.model import Model

__all__ = ["pairs_of"]


def pairs_of(
    model: Model, follows: Callable[[nn.Module], bool], wanted: Callable[[str], bool]
) -> list[tuple[str, str]]:
    """Paths of a convolution and of the layer that reads it, each run once.

    Args:
        follows: whether a module may be the second.
        wanted: whether a convolution may be the first, by its path.
    """
    pairs, outputs, result = _pairs(model, follows)
    pairs = [(conv, other) for conv, other in pairs if wanted(conv)]
    # All at once first: one run settles the usual network.
    if pairs and not _alone(model, pairs, outputs, result):
        pairs = [pair for pair in pairs if _alone(model, [pair], outputs, result)]
    return pairs


def _pairs(
    model: Model, follows: Callable[[nn.Module], bool]
) -> tuple[list[tuple[str, str]], dict[str, Tensor], Tensor]:
    """Both of each pair, run once; the outputs of the second; the network's output."""
    made: dict[int, tuple[str, int]] = {}
    kept: list[Tensor] = []  # alive, so that an id is not used twice
    met: dict[str, list[str | None]] = {}
    runs: list[str] = []
    outputs: dict[str, Tensor] = {}
    handles = []
    for name, module in model.module.named_modules():
        if isinstance(module, nn.Conv2d):

            def note(_: nn.Module, args: Any, output: Tensor, name: str = name) -> None:
                # An operation in place gives the same tensor a new version.
                made[id(output)] = (name, output._version)
                kept.append(output)
                runs.append(name)

            handles.append(module.register_forward_hook(note))
        if follows(module):

            def see(_: nn.Module, args: tuple[Tensor, ...], name: str = name) -> None:
                conv, version = made.get(id(args[0]), (None, -1))
                met.setdefault(name, []).append(conv if args[0]._version == version else None)

            def keep(_: nn.Module, args: Any, output: Tensor, name: str = name) -> None:
                outputs[name] = output.clone()

            handles.append(module.register_forward_pre_hook(see))
            handles.append(module.register_forward_hook(keep))
    result = _run(model, handles)
    pairs = [(f[0], second) for second, f in met.items() if len(f) == 1 and f[0] is not None]
    taken = [conv for conv, _ in pairs]
    once = [(c, s) for c, s in pairs if taken.count(c) == 1 and runs.count(c) == 1]
    return once, outputs, result


def _alone(
    model: Model, pairs: list[tuple[str, str]], outputs: dict[str, Tensor], result: Tensor
) -> bool:
    """Whether other numbers out of the first, but the same out of the second, change nothing.

    Else something besides reads a convolution's output.
    """
    handles = []
    for conv, second in pairs:
        other, same = model.module.get_submodule(conv), model.module.get_submodule(second)

        def disturb(_: nn.Module, args: Any, output: Tensor) -> Tensor:
            return 2 * output + 1

        def restore(_: nn.Module, args: Any, output: Tensor, name: str = second) -> Tensor:
            return outputs[name].clone()

        handles.append(other.register_forward_hook(disturb))
        handles.append(same.register_forward_hook(restore))
    return torch.equal(_run(model, handles), result)


def _run(model: Model, handles: list[Any]) -> Tensor:
    try:
        with torch.no_grad():
            return model.run(model.example)
    finally:
        for handle in handles:
            handle.remove()
