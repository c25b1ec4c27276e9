"""Hidden states of a network while it runs, all as [batch, places, width].

blocks      what each block gives; of a picture every place is one
attention   queries, keys and values of each block: what the first linear layers that read the
            same input give, or the thirds of a single one that is three times as wide
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from penjing.errors import UsageError
from penjing.graph import given
from penjing.model import Batch, Model

__all__ = ["States", "alike", "attention_of", "mask_of", "tapped"]

# By block what was seen in it.
States = list[tuple[Tensor, ...]]


@contextmanager
def tapped(model: Model, layers: Sequence[Sequence[str]]) -> Iterator[States]:
    """Notes what layers give in a run.

    Args:
        layers: paths to note of each block, in order.

    Yields:
        Filled by a run: one tuple a block.
    """
    states: States = [() for _ in layers]

    def note(_: nn.Module, args: Any, output: Any, number: int, whole: bool) -> None:
        own = _places(output[0] if isinstance(output, tuple) else output)
        states[number] = (*states[number], *([own] if whole else own.chunk(3, -1)))

    handles = [
        model.module.get_submodule(path).register_forward_hook(
            partial(note, number=number, whole=len(paths) != 1 or path in model.blocks)
        )
        for number, paths in enumerate(layers) for path in paths
    ]  # fmt: skip
    try:
        yield states
    finally:
        for handle in handles:
            handle.remove()


def attention_of(model: Model) -> list[list[str]]:
    """Of each block the layers that make queries, keys and values.

    Raises:
        UsageError: a block has none.
    """
    found = []
    for block in model.blocks:
        paths = _together(model, block)
        if not paths:
            raise UsageError(
                "relations of queries, keys and values", got=f"none in {block}",
                allowed="attention", next="take the feature similarity",
            )  # fmt: skip
        found.append(paths)
    return found


def _together(model: Model, block: str) -> list[str]:
    groups: list[list[str]] = []
    inputs: list[Tensor] = []

    def note(_: nn.Module, args: Any, kwargs: Any, path: str) -> None:
        x = given(args, kwargs)
        if not inputs or inputs[-1] is not x:
            inputs.append(x)
            groups.append([])
        groups[-1].append(path)

    layers = {
        f"{block}.{name}": layer
        for name, layer in model.module.get_submodule(block).named_modules()
        if isinstance(layer, nn.Linear)
    }
    handles = [
        layer.register_forward_pre_hook(partial(note, path=path), with_kwargs=True)
        for path, layer in layers.items()
    ]
    try:
        with torch.no_grad():
            model.run(model.example)
    finally:
        for handle in handles:
            handle.remove()
    several = next((group[:3] for group in groups if len(group) >= 3), [])
    fused = [
        path for path, layer in layers.items()
        if layer.weight.shape[0] == 3 * layer.weight.shape[1]
    ]  # fmt: skip
    return several or fused[:1]


def _places(x: Tensor) -> Tensor:
    """[batch, places, width]; convolutions give [batch, width, height, width of the picture]."""
    if x.ndim == 4:
        return x.flatten(2).transpose(1, 2)
    return x.unsqueeze(1) if x.ndim == 2 else x


def alike(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Both with as many places, the larger one averaged over neighbours; [batch, places, width]."""
    few = min(student.shape[1], teacher.shape[1])
    pool = nn.functional.adaptive_avg_pool1d
    return tuple(  # type: ignore[return-value]
        x if x.shape[1] == few else pool(x.transpose(1, 2), few).transpose(1, 2)
        for x in (student, teacher)
    )


def mask_of(batch: Batch, states: Tensor) -> Tensor | None:
    """Which places are no padding, bool [batch, places]; None for all."""
    mask = batch.get("attention_mask")
    return mask.bool() if mask is not None and mask.shape == states.shape[:2] else None
