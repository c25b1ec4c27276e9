"""Edits that divide shared channels: 1/s into what writes them, s into what reads them, exactly."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from penjing.channels import Channels
from penjing.edits import perform
from penjing.model import Model
from penjing.norms import gain_of
from penjing.recipe import Edit

__all__ = ["division", "is_plain", "same"]

# Largest change of an output, relative to the largest output, that is rounding.
_ROUNDING = 1e-4


def division(model: Model, planned: list[tuple[Channels, Tensor]]) -> list[Edit]:
    """New weights and biases of all that write or read the channels, and of norms the gains.

    Args:
        model: stays as it is.
        planned: sets with s, float32 [channels].
    """
    values: dict[str, Tensor] = {}
    why: dict[str, list[str]] = {}

    def change(name: str, factor: Tensor, along: int, said: str, middle: float = 0.0) -> None:
        old = values.get(name, model.module.get_parameter(name).detach())
        shape = [1] * old.ndim
        shape[along] = -1
        wide = factor.double().reshape(shape)
        values[name] = ((old.double() + middle) * wide - middle).to(old.dtype)
        why.setdefault(name, []).append(said)

    for found, s in planned:
        for name in found.writers:
            layer = model.module.get_submodule(name)
            # A norm may store its gain less one.
            gain = None if isinstance(layer, nn.Linear | nn.Conv2d) else gain_of(layer)
            middle = 0.0 if gain is None else 1 - float(gain.neutral[0])
            [weight, *biases] = [n for n, _ in layer.named_parameters()]
            change(f"{name}.{weight}", 1 / s.double(), 0, "outputs divided", middle)
            for bias in biases:
                change(f"{name}.{bias}", 1 / s.double(), 0, "outputs divided")
        for name in found.readers:
            layer = model.module.get_submodule(name)
            wide = s[list(found.columns)] if found.columns else s
            if getattr(layer, "groups", 1) == 1:
                change(f"{name}.weight", wide, 1, "inputs multiplied")
            else:  # each output reads its own channel, see `is_plain`
                count: int = layer.out_channels  # type: ignore[assignment]
                each = wide.repeat_interleave(count // len(s))
                change(f"{name}.weight", each, 0, "inputs multiplied")
    return [Edit("weight", n, v, f"{' and '.join(why[n])}, exactly") for n, v in values.items()]


def same(model: Model, planned: list[tuple[Channels, Tensor]]) -> bool:
    """Whether the network gives the same on its example; what was found by running is proved so."""
    twin = model.copy()
    for edit in division(model, planned):
        perform(twin, edit)
    with torch.no_grad():
        was, now = model.run(model.example), twin.run(model.example)
    return bool((now - was).abs().max() <= _ROUNDING * was.abs().max())


def is_plain(model: Model, path: str) -> bool:
    """Not quantized, and dense or with one input channel a group."""
    layer = model.module.get_submodule(path)
    if f"{path}.weight" in model.planes or path in model.activations:
        return False
    groups = getattr(layer, "groups", 1)
    return groups in (1, getattr(layer, "in_channels", 1))
