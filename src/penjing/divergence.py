"""How far the outputs of an edited network are from those of the original.

logits           mean over samples (texts: tokens) of KL(original || edited), in nats
single numbers   mean over samples of (edited - original)^2, over the original's variance
anything else    mean over samples of 1 - cosine
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from penjing.model import Batch, Interface

__all__ = ["divergence", "divergences"]

# Outputs compared at once.
_ROWS = 64


def divergence(
    interface: Interface, batches: Sequence[Batch], reference: Sequence[Tensor],
    outputs: Iterable[Tensor],
) -> float:  # fmt: skip
    """Of outputs, one a batch, from the original's; infinite where one is not finite."""
    found = divergences(interface, batches, reference, outputs)
    total = float(found.sum())
    # NaN compares false: without this a broken network would look perfect.
    return max(0.0, total / max(len(found), 1)) if math.isfinite(total) else math.inf


def divergences(
    interface: Interface, batches: Sequence[Batch], reference: Sequence[Tensor],
    outputs: Iterable[Tensor],
) -> Tensor:  # fmt: skip
    """The same of every sample (texts: token), [n] float64."""
    if all(x.flatten(1).shape[1] == 1 for x in reference) and interface != "causal":
        return _of_numbers(reference, outputs)
    logits = interface in ("classifier", "causal", "image")
    found = []
    for batch, wanted, output in zip(batches, reference, outputs, strict=True):
        if interface == "causal":
            kept = batch["attention_mask"].bool()
            output, wanted = output[kept], wanted[kept]
        # A few rows at a time: a vocabulary-wide batch and its copies do not fit a cache.
        wanted, output = wanted.flatten(1), output.flatten(1)
        for a, b in zip(torch.split(wanted, _ROWS), torch.split(output, _ROWS), strict=True):
            a, b = a.float(), b.float()
            if logits:
                p, q = a.log_softmax(-1), b.log_softmax(-1)
                found.append((p.exp() * (p - q)).sum(-1).double())
            else:
                found.append((1 - torch.cosine_similarity(b, a)).double())
    return torch.cat(found) if found else torch.zeros(0, dtype=torch.float64)


def _of_numbers(reference: Sequence[Tensor], outputs: Iterable[Tensor]) -> Tensor:
    wanted, found = (torch.cat([x.double().flatten() for x in xs]) for xs in (reference, outputs))
    spread = float(wanted.var(correction=0)) or 1.0
    return (found - wanted).square() / spread
