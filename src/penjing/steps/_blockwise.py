"""Block by block before the whole: each block is trained to give what the original's block gives.

    argmin  sum over places |B'(x') - B(x)|^2 / sum over places |B(x)|^2

x' is what the blocks before it, trained already, give; x is what the original's give. There is no
way back through the rest of the network, so a step costs the share of a block (EBFT, Guo et al.,
arXiv 2402.12419; of quantized blocks EfficientQAT, Chen et al., arXiv 2407.11062).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from penjing.calibrate import Stream
from penjing.checkpoint import Checkpoint
from penjing.hiddens import distance, twins
from penjing.model import Batch, Model
from penjing.objective import products
from penjing.steps._recovery import Trained
from penjing.training import Descent, descend

__all__ = ["blockwise"]


def blockwise(
    what: Trained, original: Model, batches: Sequence[Batch], *, lr: float, steps: int,
    seconds: float, seed: int, optimizer: str, descent: Descent, path: Path | None,
    precision: str = "auto",
) -> int:  # fmt: skip
    """Train what a block has of its own, one block after the other.

    Args:
        steps: of each block.
        seconds: of each block, at the most; 0 for no limit.
        precision: of products.
        path: of a checkpoint; each block has its own beside it.

    Returns:
        How many blocks were trained; those with nothing to train, or nobody to be like, were not.
    """
    student, count = what.student, 0
    pairs = dict(twins(original, student))
    before, after = Stream(original, batches), Stream(student, batches)
    for index, name in enumerate(student.blocks):
        if name not in pairs:
            continue
        place = original.blocks.index(pairs[name])
        before.enter(place)
        goals = list(before.run(original.module.get_submodule(original.blocks[place])))
        after.enter(index)
        own = what.inside(name)
        block = student.module.get_submodule(name)
        groups = own.groups(lr)
        if not groups:
            continue
        calls = list(after.calls())
        parts: list[Batch] = [{"number": torch.tensor(i)} for i in range(len(batches))]

        def value(part: Batch, _: float, calls=calls, goals=goals, block=block) -> Tensor:  # type: ignore[no-untyped-def]
            number = int(part["number"])
            with products(precision, student.device.type):
                found = calls[number].forward(block, calls[number].hidden)
            return distance([found], [goals[number]], batches[number])

        kept = path and path.with_name(f"{path.stem}-{index:03d}{path.suffix}")
        for _ in descend(
            parts, groups, value, steps=steps, seconds=seconds, seed=seed, optimizer=optimizer,
            descent=descent, checkpoint=Checkpoint(kept, last=True),
        ):  # fmt: skip
            own.keep_masks()
        after.outputs = None
        count += 1
    return count
