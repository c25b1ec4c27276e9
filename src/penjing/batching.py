"""The same samples in batches of our own making.

Sums over calibration data, and the hidden states they are of, differ in their last bits with the
way samples are put together. Made again by rules that look at the samples alone, batches are the
same however the samples came, and so are the bytes of what is fitted to them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from penjing.model import Batch, Model

__all__ = ["by_length", "rebatched", "samples_of"]

# Samples of a batch, and tokens with their padding.
_ROWS, _TOKENS = 16, 2048


def rebatched(model: Model, batches: Sequence[Batch]) -> list[Batch]:
    """All samples in their order, [batch, ...] each; padding is on the right and no longer than
    the longest of a batch asks for.

    Samples that are not alike (other inputs, other shapes without a mask) stay as they came.
    """
    first = batches[0]
    plain = all(b.keys() == first.keys() for b in batches) and all(x.ndim for x in first.values())
    if not plain:
        return list(batches)
    mask = "attention_mask" if "input_ids" in first and "attention_mask" in first else None
    if mask is None and any(
        b[n].shape[1:] != x.shape[1:] for b in batches for n, x in first.items()
    ):
        return list(batches)
    samples = [sample for batch in batches for sample in samples_of(batch, mask)]
    pads = {"input_ids": _pad(model)}
    return [_joined(group, pads) for group in _groups(samples, mask)]


def by_length(model: Model, batches: Sequence[Batch], seed: int) -> list[Batch]:
    """The same samples in batches of texts of about one length, in random order.

    Batches have as many samples as they came with, and the order is of `seed`. Samples without a
    mask stay as they came.
    """
    if not all("input_ids" in b and "attention_mask" in b for b in batches):
        return list(batches)
    rows = max(len(batch["input_ids"]) for batch in batches)
    samples = [sample for batch in batches for sample in samples_of(batch, "attention_mask")]
    lengths = [len(sample["attention_mask"]) for sample in samples]
    if len(set(lengths)) == 1:
        return list(batches)
    order = sorted(range(len(samples)), key=lengths.__getitem__)
    pads = {"input_ids": _pad(model)}
    made = [
        _joined([samples[n] for n in order[start : start + rows]], pads)
        for start in range(0, len(order), rows)
    ]
    turns = torch.randperm(len(made), generator=torch.Generator().manual_seed(seed)).tolist()
    return [made[n] for n in turns]


def samples_of(batch: Batch, mask: str | None) -> Iterator[Batch]:
    """One sample at a time, without the batch axis; of a text what the mask shows."""
    for row in range(len(next(iter(batch.values())))):
        sample = {name: x[row] for name, x in batch.items()}
        if mask is not None:
            shown = sample[mask].bool()
            if not bool(shown.any()):  # an empty text keeps a place
                shown[0] = True
            size = shown.shape
            sample = {n: x[shown] if x.shape == size else x for n, x in sample.items()}
        yield sample


def _groups(samples: list[Batch], mask: str | None) -> Iterator[list[Batch]]:
    group: list[Batch] = []
    longest = 0
    for sample in samples:
        length = len(sample[mask]) if mask else 0
        longest = max(longest, length)
        if group and (len(group) == _ROWS or (len(group) + 1) * longest > _TOKENS):
            yield group
            group, longest = [], length
        group.append(sample)
    if group:
        yield group


def _joined(group: list[Batch], pads: dict[str, int]) -> Batch:
    made: Batch = {}
    for name in group[0]:
        parts: list[Tensor] = [sample[name] for sample in group]
        if len({tuple(p.shape) for p in parts}) > 1:
            made[name] = torch.nn.utils.rnn.pad_sequence(
                parts, batch_first=True, padding_value=pads.get(name, 0)
            )
        else:
            made[name] = torch.stack(parts)
    return made


def _pad(model: Model) -> int:
    for holder in (getattr(model.module, "config", None), model.tokenizer):
        found = getattr(holder, "pad_token_id", None)
        if isinstance(found, int) and found >= 0:
            return found
    return 0
