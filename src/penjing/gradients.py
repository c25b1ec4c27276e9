"""Slopes of the loss of the whole network by the weights of its layers, sample by sample.

    next token     mean over a sample's tokens of -log p(token | those before)
    logits         -log p(label); without labels one is drawn from the network's own p
    other outputs  -<z, y>, z ~ N(0, I): the slope of -log N(label; y, I) at a label drawn from
                   N(y, I); embeddings y have length one

With drawn labels the mean of g g^T is the Fisher information, and w^2 E[g^2] / 2 is to second
order the Kullback-Leibler divergence, in nats, of the network without w; with the data's own
labels it is the empirical one (Kunstner et al., arXiv 1905.12558). A trained network's own loss is
flat on its training data; the drawn labels ask instead how far its outputs move, and need none.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from penjing.batching import samples_of
from penjing.errors import InputError
from penjing.graph import is_weighted
from penjing.layerstats import Gradient
from penjing.model import Batch, Model
from penjing.progress import track

__all__ = ["LABELS", "gradients", "loss_of"]

LABELS = "labels"
"""Name of a batch's class numbers, int64 [batch], beside the network's inputs."""


def gradients(model: Model, batches: Sequence[Batch]) -> dict[str, Gradient]:
    """Of every layer with a weight matrix that the loss depends on, by path; not of tables.

    Two float32 numbers a weight are held.

    Args:
        model: stays as it is.
        batches: calibration batches, with `LABELS` where there are any.

    Raises:
        InputError: a loss that is NaN or infinite.
    """
    twin = model.copy(shared=True)
    twin.module.requires_grad_(False)
    layers = {
        n: m for n, m in twin.module.named_modules()
        if is_weighted(m) and not isinstance(m, nn.Embedding)
    }  # fmt: skip
    weights: list[Tensor] = [m.weight.requires_grad_() for m in layers.values()]
    sums = [torch.zeros(2, len(w), w[0].numel()) for w in weights]  # [2, out, in]
    effects: list[list[Tensor]] = [[] for _ in weights]
    generator = torch.Generator().manual_seed(0)
    count = 0
    samples = [sample for batch in batches for sample in _singles(batch)]
    for sample in track(samples, "gradients"):
        with torch.enable_grad():
            loss = loss_of(twin, sample, generator)
        if loss is None or not loss.requires_grad:
            continue
        if not bool(torch.isfinite(loss)):
            raise InputError(
                "the loss on the calibration data is not finite", got=float(loss.detach()),
                next="check the data and the model's weights",
            )  # fmt: skip
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


def _singles(batch: Batch) -> Iterator[Batch]:
    """Samples as batches of one, without padding."""
    mask = "attention_mask" if "input_ids" in batch and "attention_mask" in batch else None
    for sample in samples_of(batch, mask):
        yield {name: x.unsqueeze(0) for name, x in sample.items()}


def loss_of(model: Model, sample: Batch, generator: torch.Generator) -> Tensor | None:
    """Scalar, as above, of a batch of one; None where a text has no next token.

    Args:
        generator: draws labels.
    """
    output = model.run(sample)
    if model.interface == "causal":
        scores = output[:, :-1].log_softmax(-1)  # [1, length - 1, vocabulary]
        token = sample["input_ids"][:, 1:].unsqueeze(-1)
        return -scores.gather(-1, token).mean() if token.numel() else None
    if LABELS in sample or model.interface in ("classifier", "image"):
        scores = output.log_softmax(-1)  # [1, classes]
        label = sample.get(LABELS)
        if label is None:
            chances = scores.detach().exp().cpu()
            label = torch.multinomial(chances, 1, generator=generator)[:, 0]
        return -scores[:, label.long()].mean()
    if model.interface == "embedding":
        output = nn.functional.normalize(output, dim=-1)
    drawn = torch.randn(output.shape, generator=generator)
    return -(drawn.to(output) * output).sum()
