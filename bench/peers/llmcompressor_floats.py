"""llm-compressor's GPTQ (static act-order, its default): see floats.py.

Options: bits, group, symmetric, observer of the grids. Scales are counted as 16 bits, zero points
as those of a code.
"""

from __future__ import annotations

from typing import Any

import floats
import torch
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import AutoTokenizer


def load(folder: str) -> tuple[Any, Any]:
    return floats.network(folder), AutoTokenizer.from_pretrained(folder)


def quantize(model: tuple[Any, Any], ids: Tensor, options: dict[str, Any]) -> floats.Made:
    module, tokenizer = model
    bits, group, symmetric = options["bits"], options["group"], options["symmetric"]
    weights = {
        "num_bits": bits, "type": "int", "symmetric": symmetric, "strategy": "group",
        "group_size": group, "observer": options["observer"],
    }  # fmt: skip
    groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
    rows = [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in ids]
    oneshot(
        model=module,
        tokenizer=tokenizer,
        dataset=DataLoader(rows, batch_size=8),
        recipe=[GPTQModifier(config_groups=groups, ignore=["lm_head"])],
        num_calibration_samples=len(rows),
        max_seq_length=ids.shape[1],
        shuffle_calibration_samples=False,
    )
    found = {f"{path}.weight": layer.weight for path, layer in floats.linears(module).items()}
    return found, bits + (16 + (0 if symmetric else bits)) / group


if __name__ == "__main__":
    floats.run("llmcompressor", load, quantize)
