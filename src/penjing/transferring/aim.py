"""What a student is drawn to: a weighted sum of distances of outputs and of hidden states.

Outputs are compared by `penjing.losses`, or with the classes of the data by cross-entropy
(`labels`); hidden states of blocks that go together by `penjing.features`.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from penjing import processor
from penjing.errors import UsageError
from penjing.gradients import LABELS
from penjing.model import Batch, Model
from penjing.registry import constant, lookup
from penjing.transferring.maps import check_maps, mapped
from penjing.transferring.projection import Projection
from penjing.transferring.spans import Bridge, differ
from penjing.transferring.store import Kept
from penjing.transferring.taps import States, alike, attention_of, mask_of, tapped

__all__ = ["Aim"]


class Aim:
    """How far a student is from its teacher on a batch.

    Args:
        student: the network that is trained.
        teacher: whose outputs and states are wanted.
        outputs: weights of losses, by name; `labels` for the classes of the data.
        features: weights of features, by name.
        blocks: of each block of the student the teacher's.
        temperature: of losses that have one; None for their own.
        kept: outputs of the teacher that are known.

    Raises:
        UsageError: an unknown name, or outputs that cannot be compared.
    """

    def __init__(
        self, student: Model, teacher: Model, outputs: Mapping[str, float],
        features: Mapping[str, float], blocks: Sequence[int], *,
        temperature: float | None = None, kept: Kept | None = None,
    ) -> None:  # fmt: skip
        self.student, self.teacher, self._kept = student, teacher, kept or Kept(teacher)
        self._blocks, self._options = list(blocks), {}
        if temperature is not None:
            self._options["temperature"] = temperature
        self._outputs = [
            (weight, None if name == LABELS else lookup("losses", name, "loss"))
            for name, weight in outputs.items()
        ]
        self._features = [_Feature(name, weight, len(blocks)) for name, weight in features.items()]
        if self._kept.sampled and (set(outputs) - {"kl", LABELS} or temperature not in (None, 1)):
            raise UsageError(
                "sampled outputs of a language model", got=", ".join(outputs),
                allowed="kl at temperature 1, labels", next="leave out --cache",
            )  # fmt: skip
        self._bridge = None
        if differ(student, teacher) and teacher.interface == "causal":
            if set(outputs) - {"kl", LABELS} or temperature not in (None, 1) or self._kept.sampled:
                raise UsageError(
                    "outputs over different tokenizers", got=", ".join(outputs),
                    allowed="kl at temperature 1, labels; no --cache",
                )  # fmt: skip
            self._bridge = Bridge(student, teacher)
        if features and not blocks:
            raise UsageError("features need repeated blocks", next="leave out --features")
        self._taps = {
            of: (_layers(student, of), [_layers(teacher, of)[b] for b in blocks])
            for of in {feature.of for feature in self._features}
        }
        self._shared = Projection(learned=False)  # of outputs of different widths

    def trained(self, batch: Batch) -> list[Tensor]:
        """Parameters of projections that are trained along; a batch says their widths."""
        with torch.no_grad():
            self(batch)
        return [p for feature in self._features for one in feature.maps for p in one.parameters()]

    def __call__(self, batch: Batch, fit: bool = True) -> Tensor:
        """Scalar; products in bfloat16 where that is fast.

        Args:
            fit: whether solved projections learn from the batch.
        """
        with processor.autocast(self.student.device.type), ExitStack() as stack:
            seen = {of: self._watched(stack, of) for of in self._taps}
            output = self.student.run(batch)
            wanted = None
            if self._features or any(loss for _, loss in self._outputs):
                with torch.no_grad():
                    wanted = self._kept(batch, again=bool(self._features))
            total = output.new_zeros(())
            for share, loss in self._outputs:
                total = total + share * self._of_outputs(loss, output, wanted, batch, fit)
            for one in self._features:
                total = total + one.weight * one(*seen[one.of], batch, fit)
        return total

    def _watched(self, stack: ExitStack, of: str) -> tuple[States, States]:
        tap, (own, theirs) = _TAPS.get(of, tapped), self._taps[of]
        both = (self.student, own), (self.teacher, theirs)
        one, two = (stack.enter_context(tap(model, layers)) for model, layers in both)
        return one, two

    def _of_outputs(
        self, loss: Any, output: Tensor, wanted: Tensor | None, batch: Batch, fit: bool
    ) -> Tensor:
        if loss is None:
            return _cross_entropy(self.student, output, batch)
        assert wanted is not None
        if self._bridge is not None:
            return self._bridge.distance(output, wanted, batch)
        if output.shape[-1] != wanted.shape[-1]:
            if self.teacher.interface != "embedding":
                raise UsageError(
                    "outputs of student and teacher", got=f"{tuple(output.shape)} and "
                    f"{tuple(wanted.shape)}", allowed="the same classes or vocabulary",
                    next="--outputs labels, or --outputs none with --features",
                )  # fmt: skip
            projected = self._shared(output.unsqueeze(1), wanted.unsqueeze(1), None, fit)
            output = projected.squeeze(1)
        if self.teacher.interface == "causal":
            there = batch["attention_mask"].bool()
            output, wanted = output[there], wanted[there]
        known = inspect.signature(loss).parameters
        given: dict[str, Any] = {
            name: value for name, value in self._options.items() if name in known
        }
        if "labels" in known and LABELS in batch and output.ndim == 2:
            given["labels"] = batch[LABELS]
        return loss(output, wanted, **given)  # type: ignore[no-any-return]


class _Feature:
    """A loss of hidden states with its weight, and the projections that it wants."""

    def __init__(self, name: str, weight: float, blocks: int) -> None:
        self.weight, self._loss = weight, lookup("features", name, "loss")
        self._name, self.of = name, str(constant("features", name, "of", "blocks"))
        kind = constant("features", name, "projection", None)
        self.maps = [Projection(kind == "learned") for _ in range(blocks if kind else 0)]

    def __call__(self, student: Any, teacher: Any, batch: Batch, fit: bool) -> Tensor:
        """Mean over all pairs of states."""
        found = []
        for number, (own, theirs) in enumerate(zip(student, teacher, strict=True)):
            for s, t in zip(own, theirs, strict=True):
                if self.of == "maps" and s.shape[1] != t.shape[1]:
                    raise UsageError(
                        f"{self._name} of student and teacher", got=f"{s.shape[1]} and "
                        f"{t.shape[1]} places", allowed="as many places", next="take hidden",
                    )  # fmt: skip
                s, t = alike(s, t)
                mask = mask_of(batch, s)
                if self.maps:
                    s = self.maps[number](s, t, mask, fit)
                found.append(self._loss(s, t, mask))
        return torch.stack(found).mean()


def _cross_entropy(model: Model, output: Tensor, batch: Batch) -> Tensor:
    """With the class of each sample, of a language model with the next token."""
    if model.interface == "causal":
        there = batch["attention_mask"][:, 1:].bool()
        output, labels = output[:, :-1][there], batch["input_ids"][:, 1:][there]
    elif LABELS in batch and output.ndim == 2:
        labels = batch[LABELS]
    else:
        raise UsageError(
            "the loss labels", got=f"{'' if LABELS in batch else 'no '}labels, outputs of "
            f"{output.ndim} dimensions", allowed="a class for every sample, or a language model",
            next="leave labels out of --outputs",
        )  # fmt: skip
    return nn.functional.cross_entropy(output.float(), labels)


# How what features are of is noted, where it is not what layers give.
_TAPS: dict[str, Any] = {"maps": mapped}


def _layers(model: Model, of: str) -> list[Any]:
    """By block what is noted of it."""
    if of == "maps":
        check_maps(model)
        return list(model.blocks)
    return attention_of(model) if of == "attention" else [[block] for block in model.blocks]
