"""Every layer of a student refitted to give what its teacher's gives, one after the other.

    W, b = argmin mean |W x_s + b - y_t[kept]|^2 + lambda |W - W0|^2

x_s is the layer's input in the student as it is by then, y_t the output of the teacher's layer,
`kept` the outputs that the student has of it, W0 the weight that was copied. A ridge projection of
the teacher's whole layer onto the narrower input, solved in the order in which layers run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from penjing.layerstats import unpadded
from penjing.linalg import affine_ridge, ridge
from penjing.model import Batch, Model
from penjing.progress import track

__all__ = ["refit"]

_RIDGE = 0.01
# Places of a batch that a convolution is refitted on, at the most.
_PLACES = 8192


@torch.no_grad()
def refit(
    student: Model, teacher: Model, layers: Mapping[str, str],
    kept: Mapping[tuple[str, int], Tensor], batches: Sequence[Batch],
) -> int:  # fmt: skip
    """In place; how many layers were refitted.

    Args:
        layers: the teacher's layer of each of the student's, in the order they run.
        kept: outputs of the teacher's layer, by weight and axis 0.
    """
    count = 0
    for mine, theirs in track(list(layers.items()), "refit"):
        layer = student.module.get_submodule(mine)
        plain = isinstance(layer, nn.Conv2d) and layer.groups == 1
        if not (plain or isinstance(layer, nn.Linear)):
            continue
        sums = _sums(student, teacher, mine, theirs, kept[f"{mine}.weight", 0], batches)
        if sums is None:
            continue
        weight: Tensor = layer.weight  # type: ignore[assignment]
        tokens, first, aim, gram, cross = sums
        prior = weight.double().flatten(1)
        if layer.bias is None:
            fitted = ridge(gram / tokens, cross / tokens, _RIDGE, prior.T).T
        else:
            fitted, bias = affine_ridge(tokens, first, aim, gram, cross, _RIDGE, prior)
            layer.bias.copy_(bias)  # type: ignore[operator]
        weight.copy_(fitted.view(weight.shape))
        count += 1
    return count


_Sums = tuple[int, Tensor, Tensor, Tensor, Tensor]


def _sums(
    student: Model, teacher: Model, mine: str, theirs: str, kept: Tensor, batches: Sequence[Batch]
) -> _Sums | None:
    """Tokens, sums of x and of y, x^T x and x^T y; None where their places are not the same."""
    layer = student.module.get_submodule(mine)
    total: list[Any] = []
    for batch in batches:
        got = _first(student, mine, batch, given=True)
        wanted = _first(teacher, theirs, batch, given=False)
        if got is None or wanted is None:
            return None
        x, y = _rows(layer, got, batch), _rows(None, wanted, batch)
        if len(x) != len(y):
            return None
        if isinstance(layer, nn.Conv2d) and len(x) > _PLACES:
            some = torch.arange(0, len(x), -(-len(x) // _PLACES))
            x, y = x[some], y[some]
        x, y = x.double(), y[:, kept].double()
        new = [len(x), x.sum(0), y.sum(0), x.T @ x, x.T @ y]
        total = [a + b for a, b in zip(total, new, strict=True)] if total else new
    return tuple(total) if total and total[0] else None


class _Seen(Exception):
    """What comes behind the layer need not run."""


def _first(model: Model, path: str, batch: Batch, *, given: bool) -> Tensor | None:
    """What a layer got, or gave, when it first ran."""
    found: list[Tensor] = []

    def note(_: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        value = (args[0] if args else next(iter(kwargs.values()))) if given else output
        if isinstance(value, Tensor):
            found.append(value)
        raise _Seen

    handle = model.module.get_submodule(path).register_forward_hook(note, with_kwargs=True)
    try:
        with suppress(_Seen):
            model.run(batch)
    finally:
        handle.remove()
    return found[0] if found else None


def _rows(layer: nn.Module | None, value: Tensor, batch: Batch) -> Tensor:
    """[n, width]: tokens, or the patches that a convolution sees."""
    if isinstance(layer, nn.Conv2d):
        if isinstance(layer.padding, str):  # patches of "same" are not unfolded here
            return value.new_empty(0, 1)
        patches = functional.unfold(
            value, layer.kernel_size, layer.dilation, layer.padding, layer.stride
        )
        return patches.transpose(1, 2).flatten(0, 1)  # [batch * places, in * h * w]
    if value.ndim == 4:
        return value.flatten(2).transpose(1, 2).flatten(0, 1)
    return unpadded(value, batch.get("attention_mask")) if value.ndim == 3 else value.flatten(0, -2)
