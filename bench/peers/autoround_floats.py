"""AutoRound (block-wise learned rounding): see floats.py.

Options: bits, group, symmetric, iters (200 is its default, 50 its recipe `light`), lr (None for
its own, 1 / iters; 5e-3 in `light`), batch. Scales are counted as 16 bits, zero points as those
of a code.
"""

from __future__ import annotations

from typing import Any

import floats
from auto_round import AutoRound
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import AutoTokenizer


def load(folder: str) -> tuple[Any, Any]:
    return floats.network(folder), AutoTokenizer.from_pretrained(folder)


def quantize(model: tuple[Any, Any], ids: Tensor, options: dict[str, Any]) -> floats.Made:
    module, tokenizer = model
    bits, group, symmetric = options["bits"], options["group"], options["symmetric"]
    rows = [{"input_ids": row, "attention_mask": row.new_ones(row.shape)} for row in ids]
    rounder = AutoRound(
        module,
        tokenizer=tokenizer,
        scheme=f"W{bits}A16G{group}",
        sym=symmetric,
        dataset=DataLoader(rows, batch_size=options["batch"]),
        iters=options["iters"],
        lr=options["lr"],
        nsamples=len(rows),
        seqlen=ids.shape[1],
        batch_size=options["batch"],
        device_map="cpu",
        enable_torch_compile=False,
        amp=False,
    )
    made, _ = rounder.quantize()
    found = {f"{path}.weight": layer.weight for path, layer in floats.linears(made).items()}
    return found, bits + (16 + (0 if symmetric else bits)) / group


if __name__ == "__main__":
    floats.run("auto-round", load, quantize)
