"""Slopes of the loss of the whole network by its layers' weights and outputs, sample by sample.

    next token     mean over a sample's tokens of -log p(token | those before)
    logits         -log p(label); without labels one is drawn from the network's own p
    other outputs  -<z, y>, z ~ N(0, I): the slope of -log N(label; y, I) at a label drawn from
                   N(y, I); embeddings y have length one

With drawn labels the mean of g g^T is the Fisher information, and w^2 E[g^2] / 2 is to second
order the Kullback-Leibler divergence, in nats, of the network without w; with the data's own
labels it is the empirical one (Kunstner et al., arXiv 1905.12558). A trained network's own loss is
flat on its training data; the drawn labels ask instead how far its outputs move, and need none.

Of a layer's outputs the information is F = E[sum over places of s s^T], s the slope by the outputs
at a place: with H the mean outer product of its inputs, tr(F D H D^T) / 2 is what a change D of its
weight costs, in nats a sample, where places are independent and inputs are of slopes (K-FAC,
Martens and Grosse, arXiv 1503.05671, section 3; of convolutions arXiv 1602.01407).
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from penjing.batching import samples_of
from penjing.errors import InputError
from penjing.graph import is_weighted
from penjing.layerstats import Gradient
from penjing.model import Batch, Model
from penjing.progress import track

__all__ = ["LABELS", "SLOPES", "Slopes", "fisher", "gradients", "loss_of", "slopes"]

SLOPES = frozenset({"gradient", "fisher", "fisher-diagonal"})
"""Statistics that need the loss of the whole network."""

# Samples that F is the mean over. MiniLM's neurons chosen with 128 lose 1 % more than with 512.
_SAMPLES = 512

LABELS = "labels"
"""Name of a batch's class numbers, int64 [batch], beside the network's inputs."""


@dataclass(frozen=True, eq=False)
class Slopes:
    """What the loss says of layers, by path.

    Attributes:
        weights: by `gradients`.
        outputs: by `fisher`.
    """

    weights: Mapping[str, Gradient] = field(default_factory=dict)
    outputs: Mapping[str, Tensor] = field(default_factory=dict)


def slopes(
    model: Model, batches: Sequence[Batch], needs: frozenset[str],
    layers: Collection[str] | None = None,
) -> Slopes:  # fmt: skip
    """Those of `SLOPES` that are needed; arguments and errors as of `gradients` and `fisher`."""
    found: Mapping[str, Tensor] = {}
    if needs & {"fisher", "fisher-diagonal"}:
        found = fisher(model, batches, layers, diagonal="fisher" not in needs)
    return Slopes(gradients(model, batches) if "gradient" in needs else {}, found)


def gradients(model: Model, batches: Sequence[Batch]) -> dict[str, Gradient]:
    """Of every layer with a weight matrix that the loss depends on, by path; not of tables.

    Two float32 numbers a weight are held.

    Args:
        model: stays as it is.
        batches: calibration batches, with `LABELS` where there are any.

    Raises:
        InputError: a loss that is NaN or infinite.
    """
    twin, layers = _still(model)
    weights: list[Tensor] = [m.weight.requires_grad_() for m in layers.values()]
    sums = [torch.zeros(2, len(w), w[0].numel()) for w in weights]  # [2, out, in]
    effects: list[list[Tensor]] = [[] for _ in weights]
    count = 0
    samples = [sample for batch in batches for sample in _singles(batch)]
    for _, loss in _losses(twin, samples):
        found = torch.autograd.grad(loss, weights, allow_unused=True)
        for slope, weight, total, own in zip(found, weights, sums, effects, strict=True):
            g = (torch.zeros_like(weight) if slope is None else slope).float().flatten(1).cpu()
            total[0] += g.abs()
            total[1] += g.square()
            own.append((g * weight.detach().float().flatten(1).cpu()).sum(0))  # [in]
        count += 1
    if not count:
        return {}
    return {
        path: Gradient(total[0] / count, total[1] / count, torch.stack(own))
        for path, total, own in zip(layers, sums, effects, strict=True)
    }


def fisher(
    model: Model, batches: Sequence[Batch], layers: Collection[str] | None = None, *,
    diagonal: bool = False,
) -> dict[str, Tensor]:  # fmt: skip
    """F of layers that the loss depends on, by path: [out, out] float64.

    Args:
        model: stays as it is.
        batches: calibration batches; of more than 512 samples about as many, evenly spread.
        layers: paths; without any all that have a matrix. That of a vocabulary is very large.
        diagonal: of F alone, [out].

    Raises:
        InputError: a loss that is NaN or infinite.
    """
    twin, every = _still(model)
    wanted = {n: m for n, m in every.items() if layers is None or n in layers}
    sums: dict[str, Tensor] = {}
    anchor = torch.ones((), requires_grad=True, device=twin.device)  # no parameter asks for slopes

    def add(slope: Tensor, path: str, axis: int) -> None:
        rows = slope.movedim(axis, -1).flatten(0, -2).float()  # [places, out]
        found = rows.square().sum(0) if diagonal else rows.T @ rows
        sums[path] = sums.get(path, 0) + found.double().cpu()

    def watch(layer: nn.Module, _: object, output: Tensor, path: str) -> Tensor:
        output = output if output.requires_grad else output * anchor
        axis = -1 if isinstance(layer, nn.Linear) else 1
        output.register_hook(functools.partial(add, path=path, axis=axis))  # type: ignore[no-untyped-call]
        return output

    handles = [m.register_forward_hook(functools.partial(watch, path=n)) for n, m in wanted.items()]
    # Logits of a vocabulary are large; other samples are quicker together.
    parts = [one for batch in batches for one in _singles(batch)] if twin.interface == "causal" \
        else list(batches)  # fmt: skip
    samples = sum(_size(part) for part in parts)
    parts = parts[:: max(1, -(-samples // _SAMPLES))]
    count = 0
    try:
        for part, loss in _losses(twin, parts):
            loss.backward()  # type: ignore[no-untyped-call]
            count += _size(part)
    finally:
        for handle in handles:
            handle.remove()
    return {path: total / count for path, total in sums.items()}


def _still(model: Model) -> tuple[Model, dict[str, Any]]:
    """A copy in which nothing asks for slopes, and its layers with a matrix, tables aside."""
    twin = model.copy(shared=True)
    twin.module.requires_grad_(False)
    return twin, {
        n: m for n, m in twin.module.named_modules()
        if is_weighted(m) and not isinstance(m, nn.Embedding)
    }  # fmt: skip


def _size(batch: Batch) -> int:
    return len(next(iter(batch.values())))


def _losses(twin: Model, batches: Sequence[Batch]) -> Iterator[tuple[Batch, Tensor]]:
    """Of every batch that has one."""
    generator = torch.Generator().manual_seed(0)
    for batch in track(batches, "gradients"):
        with torch.enable_grad():
            loss = loss_of(twin, batch, generator)
        if loss is None or not loss.requires_grad:
            continue
        if not bool(torch.isfinite(loss)):
            raise InputError(
                "the loss on the calibration data is not finite", got=float(loss.detach()),
                next="check the data and the model's weights",
            )  # fmt: skip
        yield batch, loss


def _singles(batch: Batch) -> Iterator[Batch]:
    """Samples as batches of one, without padding."""
    mask = "attention_mask" if "input_ids" in batch and "attention_mask" in batch else None
    for sample in samples_of(batch, mask):
        yield {name: x.unsqueeze(0) for name, x in sample.items()}


def loss_of(model: Model, batch: Batch, generator: torch.Generator) -> Tensor | None:
    """Scalar, as above, summed over the samples of a batch; None where no text has a next token.

    Args:
        generator: draws labels.
    """
    output = model.run(batch)
    if model.interface == "causal":
        scores = output[:, :-1].log_softmax(-1)  # [batch, length - 1, vocabulary]
        token = batch["input_ids"][:, 1:]  # [batch, length - 1]
        shown = batch["attention_mask"][:, 1:].bool() if "attention_mask" in batch else token >= 0
        each = -scores.gather(-1, token.unsqueeze(-1))[..., 0] * shown
        return (each.sum(1) / shown.sum(1).clamp_min(1)).sum() if bool(shown.any()) else None
    if LABELS in batch or model.interface in ("classifier", "image"):
        scores = output.log_softmax(-1)  # [batch, classes]
        label = batch.get(LABELS)
        if label is None:
            chances = scores.detach().exp().cpu()
            label = torch.multinomial(chances, 1, generator=generator)[:, 0]
        return -scores.gather(1, label.long().to(scores.device).unsqueeze(1)).sum()
    if model.interface == "embedding":
        output = nn.functional.normalize(output, dim=-1)
    drawn = torch.randn(output.shape, generator=generator)
    return -(drawn.to(output) * output).sum()
