"""Fold: batch norms go into the convolutions they follow, exactly.

In evaluation a batch norm is a scale and a shift of each channel, so the convolution's own
weight and bias can hold it. A pair is found by running the network: the norm's input is the
very tensor that the convolution gave, and nothing else looks at that tensor.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from penjing.calibrate import LayerStats, Unit
from penjing.model import Model
from penjing.recipe import Edit
from penjing.steps._select import selected

__all__ = ["Fold", "has_norms"]


def has_norms(model: Model) -> bool:
    """Whether there is any batch norm to fold."""
    return any(isinstance(m, nn.BatchNorm2d) for m in model.module.modules())


@dataclass(frozen=True)
class Fold:
    """Fold every batch norm that follows a convolution alone.

    Attributes:
        targets: globs of convolution paths; without any, all of them.
    """

    name: ClassVar[str] = "fold"
    scope: ClassVar[str] = "model"
    needs: ClassVar[frozenset[str]] = frozenset()

    targets: tuple[str, ...] = ()

    def plan(self, unit: Unit, stats: dict[str, LayerStats]) -> Iterator[Edit]:
        """One fold a pair."""
        wanted = selected(
            Unit("", unit.model, dict(unit.model.module.named_modules()), None, None), self.targets
        )
        pairs, outputs, result = _pairs(unit.model)
        pairs = [(conv, norm) for conv, norm in pairs if conv in wanted]
        # All at once first: one run settles the usual network.
        if pairs and not _alone(unit.model, pairs, outputs, result):
            pairs = [pair for pair in pairs if _alone(unit.model, [pair], outputs, result)]
        for conv, norm in pairs:
            yield Edit("fold", conv, norm, f"holds {norm}, exactly")


def _pairs(model: Model) -> tuple[list[tuple[str, str]], dict[str, Tensor], Tensor]:
    """Convolution and norm, each run once; the norms' outputs; the network's output."""
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
        elif isinstance(module, nn.BatchNorm2d) and module.track_running_stats:

            def see(_: nn.Module, args: tuple[Tensor, ...], name: str = name) -> None:
                conv, version = made.get(id(args[0]), (None, -1))
                met.setdefault(name, []).append(conv if args[0]._version == version else None)

            def keep(_: nn.Module, args: Any, output: Tensor, name: str = name) -> None:
                outputs[name] = output.clone()

            handles.append(module.register_forward_pre_hook(see))
            handles.append(module.register_forward_hook(keep))
    result = _run(model, handles)
    pairs = [(f[0], norm) for norm, f in met.items() if len(f) == 1 and f[0] is not None]
    taken = [conv for conv, _ in pairs]
    once = [(c, n) for c, n in pairs if taken.count(c) == 1 and runs.count(c) == 1]
    return once, outputs, result


def _alone(
    model: Model, pairs: list[tuple[str, str]], outputs: dict[str, Tensor], result: Tensor
) -> bool:
    """Whether other numbers out of the convolutions, but the same out of the norms, change nothing.

    Else something besides the norm reads a convolution's output.
    """
    handles = []
    for conv, norm in pairs:
        other, same = model.module.get_submodule(conv), model.module.get_submodule(norm)

        def disturb(_: nn.Module, args: Any, output: Tensor) -> Tensor:
            return 2 * output + 1

        def restore(_: nn.Module, args: Any, output: Tensor, name: str = norm) -> Tensor:
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
