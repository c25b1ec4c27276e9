"""What a network is drawn to in training.

Without labels the aim is the output of the original network (distillation, Hinton et al., arXiv
1503.02531); with `labels` it is the class of each sample, of a language model the next token, by
cross-entropy.
"""

from __future__ import annotations

import contextlib
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from penjing import processor
from penjing.detour import Detours, Way
from penjing.errors import UsageError
from penjing.gradients import LABELS
from penjing.hiddens import distance, twins, watched
from penjing.model import Batch, Model
from penjing.registry import lookup

__all__ = ["PRECISIONS", "Objective", "check_loss", "products"]


def check_loss(name: str | None) -> None:
    """Refuse what is no loss.

    Raises:
        UsageError: the choices are listed.
    """
    if name not in (None, LABELS):
        lookup("losses", name, "loss")


PRECISIONS = ("auto", "float32", "bfloat16")
"""Of products: `auto` is bfloat16 where the processor is fast with it."""
# Numbers of targets that are held; those of more batches are computed again each time.
_HELD = 1 << 27


def products(precision: str, device: str) -> AbstractContextManager[object]:
    """Products of `precision`, one of `PRECISIONS`, on a device of a type such as `cpu`."""
    stack = contextlib.ExitStack()
    if precision == "bfloat16":
        stack.enter_context(torch.autocast(device, torch.bfloat16))
    else:
        stack.enter_context(processor.autocast(device, precision == "auto"))
    if device == "cpu" and torch.is_autocast_enabled("cpu"):
        stack.enter_context(_FloatAttention())
    return stack


class _FloatAttention(TorchFunctionMode):
    """Attention in float32: torch's way back through it in bfloat16 is six times slower here."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not nn.functional.scaled_dot_product_attention:
            return func(*args, **kwargs)
        kept = args[0].dtype
        with torch.autocast("cpu", enabled=False):
            args = [_float(x) for x in args]
            kwargs = {name: _float(x) for name, x in kwargs.items()}
            return func(*args, **kwargs).to(kept)


def _float(x: Any) -> Any:
    return x.float() if isinstance(x, Tensor) and x.is_floating_point() else x


class Objective:
    """How far a network is from what is wanted of it.

    Args:
        original: whose outputs are wanted; those of a batch are computed once.
        loss: a name of `penjing.losses`, `labels`, or None: see `Model.suited_loss`.
        hidden: weight of `penjing.hiddens.distance` beside the loss.
        precision: of products in training, one of `PRECISIONS`.
        front: blocks, from the first on, that give what the original's do, and are not run
            again; see `penjing.front`.
    """

    def __init__(
        self, original: Model, loss: str | None = None, *, hidden: float = 0.0,
        precision: str = "auto", front: int = 0,
    ) -> None:  # fmt: skip
        self._original, self._labels = original, loss == LABELS
        self._loss: Any = None
        if not self._labels:
            self._loss = lookup("losses", loss or original.suited_loss, "loss")
        self._hidden, self._precision, self._front = hidden, precision, front
        self._known: dict[int, tuple[Tensor | None, list[Tensor]]] = {}
        self._held = 0
        self._detours: dict[int, Detours] = {}
        self._twins: dict[int, tuple[tuple[str, str], ...]] = {}

    def __call__(self, model: Model, batch: Batch) -> Tensor:
        """Scalar; the loss on the outputs and, where it has a weight, that on hidden states."""
        with products(self._precision, model.device.type):
            wanted, states = self._wanted(model, batch)
            entering = states.pop(0) if self._front else None
            with watched(model, [own for own, _ in self._pairs(model)]) as found:
                output = model.run(batch) if entering is None else self._behind(
                    model, batch, entering
                )  # fmt: skip
            value = self._compare(output, wanted, batch)
            return value + self._hidden * distance(found, states, batch) if states else value

    def exact(self, model: Model, batch: Batch) -> float:
        """The loss on the outputs in full precision: bfloat16 hides what is left to win."""
        with torch.no_grad():
            wanted = None if self._labels else self._original.run(batch)
            return float(self._compare(model.run(batch), wanted, batch))

    def _pairs(self, model: Model) -> tuple[tuple[str, str], ...]:
        """Blocks that are left behind the front, with those of the original."""
        if not self._hidden:
            return ()
        if id(model) not in self._twins:
            self._twins[id(model)] = twins(self._original, model)[self._front :]
        return self._twins[id(model)]

    def _behind(self, model: Model, batch: Batch, entering: Tensor) -> Tensor:
        """The outputs where the front gives what is known."""
        if id(model) not in self._detours:
            self._detours[id(model)] = Detours(model, {n: x[:1] for n, x in batch.items()})
        ways: dict[int, Way] = dict.fromkeys(range(self._front))
        ways[self._front - 1] = lambda _: entering
        return self._detours[id(model)].run(batch, ways, slopes=True)

    def _wanted(self, model: Model, batch: Batch) -> tuple[Tensor | None, list[Tensor]]:
        """The original's outputs, and its hidden states at the end of the front and at the
        blocks that are left behind it."""
        if id(batch) in self._known:
            output, states = self._known[id(batch)]
            return output, [*states]
        ends = [self._original.blocks[self._front - 1]] if self._front else []
        paths = [*ends, *(path for _, path in self._pairs(model))]
        if self._labels and not paths:
            return None, []
        with torch.no_grad(), watched(self._original, paths) as states:
            output = self._original.run(batch)
        found = (None if self._labels else output, states)
        size = sum(x.numel() for x in (output, *states))
        if self._original.interface != "causal" and self._held + size <= _HELD:
            self._known[id(batch)] = found
            self._held += size
        return found[0], [*states]

    def _compare(self, output: Tensor, wanted: Tensor | None, batch: Batch) -> Tensor:
        if wanted is None:
            return nn.functional.cross_entropy(*self._labelled(output.float(), batch))
        if self._original.interface == "causal":
            kept = batch["attention_mask"].bool()
            output, wanted = output[kept], wanted[kept]
        return self._loss(output, wanted)  # type: ignore[no-any-return]

    def _labelled(self, output: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """Logits [n, classes] and classes [n]."""
        if self._original.interface == "causal":
            there = batch["attention_mask"][:, 1:].bool()
            return output[:, :-1][there], batch["input_ids"][:, 1:][there]
        if LABELS not in batch or output.ndim != 2:
            raise UsageError(
                "the loss labels", got=f"{'' if LABELS in batch else 'no '}labels, "
                f"outputs [{', '.join(map(str, output.shape))}]",
                allowed="a class for every sample and logits [batch, classes], or a language model",
                next="leave the loss out: then the original's outputs are the aim",
            )  # fmt: skip
        return output, batch[LABELS]
