"""Penjing's step `quantize` in a process of its own, as the peers have it: see floats.py.

The options are those of the step; `method` may be a quantizer's name. All linear layers of the
blocks are its targets. With `recover`, options of that step, it follows on the same windows and
trains the blocks alone. Norms that a step learned are given out too; as floats they were stored
before, and are not counted.
"""

from __future__ import annotations

from typing import Any

import floats
from torch import Tensor

import penjing
from penjing.apply import apply
from penjing.model import Model
from penjing.recipe import Recipe, Step
from penjing.steps.quantize import Quantize
from penjing.steps.recover import Recover

BLOCKS = ("model.layers.*",)


def quantize(model: Model, ids: Tensor, options: dict[str, Any]) -> floats.Made:
    # Of two samples each, for `recover`: `quantize` makes its own.
    batches = [{"input_ids": part, "attention_mask": part.new_ones(part.shape)}
               for part in ids.split(2)]  # fmt: skip
    after = options.pop("recover", None)
    steps: list[Step] = [Quantize(targets=BLOCKS, scale_bits=16, **options)]
    if after:
        steps.append(Recover(targets=BLOCKS, **after))
    made = apply(model, Recipe(tuple(steps)), batches).model
    planes = made.planes
    stored = 8 * sum(p.stored_bytes for p in planes.values())
    bits = stored / sum(made.module.get_parameter(name).numel() for name in planes)
    return {n: p for n, p in made.parameters() if n.startswith("model.layers.")}, bits


if __name__ == "__main__":
    floats.run("penjing", penjing.load, quantize)
