"""Weights as the `compressed-tensors` layout stores them, and back.

pack-quantized   w = scale * (code - zero)    code and zero unsigned, `bits` bits each, least
                 significant first in int32 words; codes along the row, zeros down the column
int-quantized    w = scale * q                q = code - 128, int8
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from penjing.packing import pack_bits, unpack_bits
from penjing.planes import IntegerPlanes

__all__ = ["Layout", "dequantized", "layout", "problem", "stored"]


@dataclass(frozen=True)
class Layout:
    """One group of `quantization_config`: how a linear layer's weight and input are stored.

    Attributes:
        bits: of a code.
        group: inputs that share a scale; 0 is the whole row.
        symmetric: every zero point is 2**(bits - 1) and not stored.
        inputs: 8-bit inputs, their range found for each token at run time.
    """

    bits: int
    group: int
    symmetric: bool
    inputs: bool

    @property
    def format(self) -> str:
        """The layout's name."""
        return "int-quantized" if self.inputs else "pack-quantized"

    def to_json(self, targets: list[str]) -> dict[str, Any]:
        """An entry of `config_groups`."""
        weights = {
            "num_bits": self.bits, "type": "int", "symmetric": self.symmetric, "dynamic": False,
            "strategy": "group" if self.group else "channel", "group_size": self.group or None,
        }  # fmt: skip
        inputs = {
            "num_bits": 8, "type": "int", "symmetric": False, "dynamic": True, "strategy": "token",
        }  # fmt: skip
        return {
            "targets": targets, "weights": weights, "output_activations": None,
            "input_activations": inputs if self.inputs else None, "format": self.format,
        }  # fmt: skip


def problem(planes: IntegerPlanes, *, inputs: bool = False) -> str:
    """Why a linear layer's weight cannot be stored; empty when it can."""
    if not planes.is_integer or planes.rotation is not None:
        return planes.kind
    bits, whole = int(planes.bits[0]), planes.group >= planes.inputs
    if not whole and planes.inputs % planes.group:
        return f"groups of {planes.group} in rows of {planes.inputs}"
    zero = _zeros(planes)
    if not torch.equal(-planes.scale[0] * zero, planes.shift):
        return "zero points that are no whole numbers"
    if not 0 <= float(zero.min()) <= float(zero.max()) < 2**bits:
        return "zero points beyond the codes"
    if inputs and planes.signed is None:
        return "8-bit inputs on weights that are not symmetric, 8 or 7 bits, one scale a row"
    return ""


def layout(planes: IntegerPlanes, *, inputs: bool = False) -> Layout:
    """The layout of a weight without `problem`."""
    bits = int(planes.bits[0])
    group = 0 if planes.group >= planes.inputs else planes.group
    half = 2 ** (bits - 1)
    bits = 8 if inputs else bits  # 7 of 8, see `penjing.processor`
    return Layout(bits, group, bool((_zeros(planes) == half).all()), inputs)


def stored(planes: IntegerPlanes, form: Layout) -> dict[str, Tensor]:
    """Tensors by their last name; 8-bit scales are written as the float32 they stand for."""
    scale = planes.scale[0].to(torch.float16 if planes.scale_bits == 16 else torch.float32)
    if form.inputs:
        assert planes.signed is not None
        return {"weight": planes.signed, "weight_scale": scale.clone()}
    found = {
        "weight_packed": _words(planes.codes[0], form.bits),
        "weight_scale": scale.clone(),
        "weight_shape": torch.tensor(planes.shape),
    }
    if not form.symmetric:
        zero = _zeros(planes).to(torch.uint8)  # [out, groups]
        found["weight_zero_point"] = _words(zero.T, form.bits).T.contiguous()
    return found


def dequantized(tensors: Mapping[str, Tensor], weights: Mapping[str, Any]) -> Tensor:
    """The float32 weight [out, in] of what `stored` gave.

    Args:
        tensors: by last name.
        weights: `weights` of the layer's entry in `config_groups`.
    """
    scale = tensors["weight_scale"].float()  # [out, groups]
    if "weight" in tensors:
        return tensors["weight"].float() * scale
    bits = int(weights["num_bits"])
    out, inputs = tensors["weight_shape"].tolist()
    codes = _codes(tensors["weight_packed"], bits, inputs).float()
    zero = torch.full_like(scale, 2 ** (bits - 1))
    if not weights["symmetric"]:
        zero = _codes(tensors["weight_zero_point"].T, bits, out).T.float()
    width = inputs // scale.shape[1]
    spread = [x.repeat_interleave(width, 1) for x in (zero, scale)]
    return (codes - spread[0]) * spread[1]


def _zeros(planes: IntegerPlanes) -> Tensor:
    """Zero points [out, groups]; in the middle where the scale is 0 and any would do."""
    middle = 2.0 ** (planes.bits[0] - 1)
    empty = (planes.scale[0] == 0) & (planes.shift == 0)
    return torch.where(empty, middle, planes.zero_point)


def _words(codes: Tensor, bits: int) -> Tensor:
    """Codes [rows, n] as int32 [rows, ceil(n * bits / 32)]."""
    packed = pack_bits(codes.contiguous(), bits)  # [rows, bytes]
    padded = torch.nn.functional.pad(packed, (0, -packed.shape[1] % 4))
    return padded.contiguous().view(torch.int32)


def _codes(words: Tensor, bits: int, count: int) -> Tensor:
    packed = words.contiguous().view(torch.uint8)
    return unpack_bits(packed[:, : -(-count * bits // 8)].contiguous(), bits, count)
