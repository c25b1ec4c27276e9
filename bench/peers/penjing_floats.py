"""Penjing's step `quantize` in a process of its own, as the peers have it: see floats.py.

The options are those of the step; `method` may be a quantizer's name. All linear layers of the
blocks are its targets.
"""

from __future__ import annotations

from typing import Any

import floats
from torch import Tensor

import penjing
from penjing.apply import apply
from penjing.model import Model
from penjing.recipe import Recipe
from penjing.steps.quantize import Quantize


def quantize(model: Model, ids: Tensor, options: dict[str, Any]) -> floats.Made:
    batches = [{"input_ids": part, "attention_mask": part.new_ones(part.shape)}
               for part in ids.split(8)]  # fmt: skip
    step = Quantize(targets=("model.layers.*",), scale_bits=16, **options)
    made = apply(model, Recipe((step,)), batches).model
    planes = made.planes
    weights = {name: made.module.get_parameter(name) for name in planes}
    stored = 8 * sum(p.stored_bytes for p in planes.values())
    return weights, stored / sum(w.numel() for w in weights.values())


if __name__ == "__main__":
    floats.run("penjing", penjing.load, quantize)
