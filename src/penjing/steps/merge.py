"""Merge: two convolutions with nothing between them become one, exactly.

With K1 [mid, in, h, w], stride s1, and K2 [out, mid, u, v] right behind it,

    K[o, i, p, q] = sum over m, a, b of  K2[o, m, a, b] K1[m, i, p - a s1, q - b s1]

has stride s1 s2 and the padding of the first, plus s1 times that of the second (depth merging, as
DepthShrinker, Fu et al., arXiv 2206.00843, section 3). At its border the second sees zeros where
the merged one would see what the first makes of its own border: the same only where the second
does not pad, or the first looks at single places and adds nothing.

A pair is merged where that is so, and where it makes fewer parameters; each is run, beside the two
it replaces, before it is planned.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from penjing.calibrate import LayerStats, Unit
from penjing.edits import perform
from penjing.model import Model
from penjing.recipe import Edit
from penjing.steps._following import pairs_of
from penjing.steps._select import matches

__all__ = ["Merge"]

# Largest difference in float64, of the largest output.
_PROOF = 1e-9


@dataclass(frozen=True)
class Merge:
    """Merge every convolution into the one in front of it, where that is exact.

    Attributes:
        targets: globs of paths of the first of two; without any, all of them.
    """

    name: ClassVar[str] = "merge"
    scope: ClassVar[str] = "model"
    needs: ClassVar[frozenset[str]] = frozenset()

    targets: tuple[str, ...] = ()

    def plan(self, unit: Unit, stats: dict[str, LayerStats]) -> Iterator[Edit]:
        """One merge a pair, in the order they are made; `left` says why a pair stays."""
        twin = unit.model.copy()
        refused: dict[str, str] = {}
        while True:  # what was merged may be merged again
            pairs = pairs_of(twin, _is_conv, lambda path: matches(path, self.targets))
            pairs = [pair for pair in pairs if pair[0] not in refused]
            if not pairs:
                break
            first, second = pairs[0]
            edit = Edit("merge", first, second, f"computes what it and {second} did, exactly")
            if why := _refusal(twin, first, second) or _tried(twin, edit):
                refused[first] = f"not merged with {second}: {why}"
                continue
            perform(twin, edit)
            yield edit
        for path, why in refused.items():
            yield Edit("left", path, None, why)


def _is_conv(module: nn.Module) -> bool:
    return isinstance(module, nn.Conv2d)


def _refusal(model: Model, first: str, second: str) -> str:
    """Why two convolutions are not merged; empty where they may be."""
    one, two = (model.module.get_submodule(path) for path in (first, second))
    assert isinstance(one, nn.Conv2d)
    assert isinstance(two, nn.Conv2d)
    both = one, two
    if any(type(conv) is not nn.Conv2d or conv.padding_mode != "zeros" for conv in both):
        return "one of them pads in a way of its own"
    if any(isinstance(conv.padding, str) for conv in both) or any(
        size > 1 for conv in both for size in conv.dilation
    ):
        return "one of them is dilated, or pads by name"
    if one.groups > 1 or two.groups > 1:
        return "one of them has groups"
    held = (model.masks, model.planes)
    if any(f"{p}.weight" in table for p in (first, second) for table in held) or any(
        p in model.activations for p in (first, second)
    ):
        return "one of them is pruned or quantized"
    if any(two.padding):
        if max(one.kernel_size) > 1 or any(one.padding):
            return "the second pads what the first gives, so the borders would differ"
        if one.bias is not None and bool(one.bias.any()):
            return "the second pads with zeros, where the first gives its bias"
    sides = [k + (j - 1) * s for k, j, s in zip(one.kernel_size, two.kernel_size, one.stride,
                                                strict=True)]  # fmt: skip
    made = two.out_channels * one.in_channels * sides[0] * sides[1]
    if made >= (now := one.weight.numel() + two.weight.numel()):
        return f"it would have {made} weights in place of {now}"
    return ""


def _tried(model: Model, edit: Edit) -> str:
    """What is wrong with a merged network, on the example and on noise; empty where nothing is."""
    before, after = _double(model), _double(model)
    perform(after, edit)
    example = {n: x.double() if x.is_floating_point() else x for n, x in model.example.items()}
    generator = torch.Generator().manual_seed(0)

    def noise(x: Tensor) -> Tensor:
        if not x.is_floating_point():
            return x
        return torch.randn(x.shape, generator=generator, dtype=torch.float64)

    for batch in (example, {name: noise(x) for name, x in example.items()}):
        with torch.no_grad():
            wanted, found = (_output(m, batch) for m in (before, after))
        if wanted.shape != found.shape:
            return f"outputs {list(found.shape)} in place of {list(wanted.shape)}"
        off = float((wanted - found).abs().max())
        if not off <= _PROOF * float(wanted.abs().max().clamp_min(1e-30)):
            return f"outputs differ by {off:.2g} when it is run"
    return ""


def _double(model: Model) -> Model:
    twin = model.copy()
    twin.module.double()
    return twin


def _output(model: Model, batch: dict[str, Tensor]) -> Tensor:
    """In float64, which `Model.run` would round."""
    found: list[Any] = []
    handle = model.module.register_forward_hook(lambda _, args, output: found.append(output))
    try:
        model.run(batch)
    finally:
        handle.remove()
    output = found[0]
    if isinstance(output, Tensor):
        return output
    return next(x for x in output.values() if isinstance(x, Tensor))
