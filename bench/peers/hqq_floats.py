"""HQQ (half-quadratic quantization, no data): see floats.py.

Options: bits, group, and axis, 1 (its default) or 0 (said by its makers to be better). Scales
and zero points are stored in 16 bits each.
"""

from __future__ import annotations

from typing import Any

import floats
import torch
from hqq.core.quantize import BaseQuantizeConfig, HQQLinear
from torch import Tensor, nn


def quantize(module: nn.Module, ids: Tensor, options: dict[str, Any]) -> floats.Made:
    bits, group = options["bits"], options["group"]
    config = BaseQuantizeConfig(nbits=bits, group_size=group, axis=options["axis"])
    weights = {}
    for path, layer in floats.linears(module).items():
        made = HQQLinear(
            layer, config, compute_dtype=torch.float32, device="cpu", del_orig=False
        )  # fmt: skip
        for name in ("scale", "zero"):
            made.meta[name] = made.meta[name].half().float()
        weights[f"{path}.weight"] = made.dequantize()
    return weights, bits + 32 / group


if __name__ == "__main__":
    floats.run("hqq", floats.network, quantize)
