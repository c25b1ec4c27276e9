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

__all__ = ["divergence"]

# Outputs compared at once.
_ROWS = 64


def divergence(
    interface: Interface, batches: Sequence[Batch], reference: Sequence[Tensor],
    outputs: Iterable[Tensor],
) -> float:  # fmt: skip
    """Of outputs, one a batch, from the original's; infinite where one is not finite."""
    if all(x.flatten(1).shape[1] == 1 for x in reference) and interface != "causal":
        return _of_numbers(reference, outputs)
    logits = interface in ("classifier", "causal", "image")
    total, count = 0.0, 0
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
                values = (p.exp() * (p - q)).sum(-1)
            else:
                values = 1 - torch.cosine_similarity(b, a)
            total, count = total + float(values.sum()), count + len(values)
    # NaN compares false: without this a broken network would look perfect.
    return max(0.0, total / max(count, 1)) if math.isfinite(total) else math.inf


def _of_numbers(reference: Sequence[Tensor], outputs: Iterable[Tensor]) -> float:
    wanted, found = (torch.cat([x.double().flatten() for x in xs]) for xs in (reference, outputs))
    spread = float(wanted.var(correction=0)) or 1.0
    error = float((found - wanted).square().mean()) / spread
    return error if math.isfinite(error) else math.inf
