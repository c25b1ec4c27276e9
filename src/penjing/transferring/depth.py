"""Which block of the teacher has in its place in depth what a block of the student has.

By centred kernel alignment of what the blocks give, in order, with the largest sum; a student that
knows nothing yet says little of it, and is matched by place instead (`matching`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from penjing.model import Batch, Model
from penjing.similarity import linear_cka
from penjing.transferring.taps import mask_of, tapped

__all__ = ["by_cka"]

# Samples that are compared.
_SAMPLES = 256


@torch.no_grad()
def by_cka(student: Model, teacher: Model, batches: Sequence[Batch]) -> tuple[int, ...]:
    """Of each block of the student one of the teacher's, by number, never going back."""
    if not student.blocks or not teacher.blocks:
        return ()
    pooled: list[list[list[Tensor]]] = []
    for model in (student, teacher):
        found: list[list[Tensor]] = [[] for _ in model.blocks]
        count = 0
        for batch in batches:
            with tapped(model, [[block] for block in model.blocks]) as states:
                model.run(batch)
            for own, state in zip(found, states, strict=True):
                x, mask = state[0].float(), mask_of(batch, state[0])
                kept = torch.ones(x.shape[:2]) if mask is None else mask.float()
                own.append((x * kept.unsqueeze(-1)).sum(1) / kept.sum(1, keepdim=True))
            count += len(found[0][-1])
            if count >= _SAMPLES:
                break
        pooled.append(found)
    ours, theirs = ([torch.cat(own) for own in found] for found in pooled)
    best = [[linear_cka(x, y) for y in theirs] for x in ours]
    return ascending(best)


def ascending(gain: Sequence[Sequence[float]]) -> tuple[int, ...]:
    """Of each row a column, never to the left of the last one's, with the largest sum."""
    total = [list(gain[0])]
    for row in gain[1:]:
        total.append([value + max(total[-1][: j + 1]) for j, value in enumerate(row)])
    end, path = len(total[0]), []
    for row in reversed(total):
        end = max(range(end), key=row.__getitem__) + 1
        path.append(end - 1)
    return tuple(reversed(path))
