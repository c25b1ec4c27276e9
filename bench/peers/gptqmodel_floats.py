"""GPTQModel's GPTQ, act-group-aware (its default): see floats.py.

It asks for torch 2.14.1 or newer and is installed beside 2.13 without its dependencies' pins. On
a machine of two cores it does not start with its own number of workers, which is 1 there.
Options: bits, group, symmetric, mse (exponent of its search for a grid, 0 for min-max). Scales are
counted as 16 bits, zero points as those of a code.
"""

from __future__ import annotations

import os
from typing import Any

os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")

import floats
import torch
from gptqmodel import BACKEND, GPTQModel, QuantizeConfig
from gptqmodel.utils.model import convert_gptq_v1_to_v2_format_module
from torch import Tensor


def quantize(folder: str, ids: Tensor, options: dict[str, Any]) -> floats.Made:
    bits, group, symmetric = options["bits"], options["group"], options["symmetric"]
    config = QuantizeConfig(
        bits=bits, group_size=group, sym=symmetric, mse=options["mse"], offload_to_disk=False
    )
    config.device = "cpu"
    model = GPTQModel.load(folder, config, dtype=torch.float32)
    rows = [{"input_ids": row.tolist(), "attention_mask": [1] * len(row)} for row in ids]
    model.quantize(rows, batch_size=8, backend=BACKEND.GPTQ_TORCH)
    found = {}
    for path, layer in model.model.named_modules():
        if hasattr(layer, "dequantize_weight") and ".layers." in path:
            # Format 1 stores zero points less one; the layer's own kernel wants them whole.
            if layer.qzero_format() == 1:
                convert_gptq_v1_to_v2_format_module(layer, bits, layer.pack_dtype)
            found[f"{path}.weight"] = layer.dequantize_weight().T
    return found, bits + (16 + (0 if symmetric else bits)) / group


if __name__ == "__main__":
    floats.run("gptqmodel", str, quantize)
