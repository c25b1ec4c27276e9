"""Convolutions that take up the linear layer behind them: a batch norm, or another convolution."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from penjing.model import parent_of

__all__ = ["fold", "merge"]


def fold(module: nn.Module, conv_path: str, norm_path: str) -> None:
    """Batch norm in evaluation is a scale and a shift of each output channel of the convolution."""
    conv = cast(nn.Conv2d, module.get_submodule(conv_path))
    norm = cast(nn.BatchNorm2d, module.get_submodule(norm_path))
    mean, variance = cast(Tensor, norm.running_mean), cast(Tensor, norm.running_var)
    with torch.no_grad():
        scale = 1 / torch.sqrt(variance + norm.eps)  # [out]
        if norm.affine:
            scale = norm.weight * scale
        bias = conv.bias if conv.bias is not None else torch.zeros_like(mean)
        conv.weight = nn.Parameter(conv.weight * scale.reshape(-1, 1, 1, 1))
        bias = (bias - mean) * scale
        conv.bias = nn.Parameter(bias + norm.bias if norm.affine else bias)
    holder, name = parent_of(module, norm_path)
    setattr(holder, name, nn.Identity())


def merge(module: nn.Module, first: str, second: str) -> None:
    """One convolution in place of two, see `penjing.steps.merge`."""
    one, two = (cast(nn.Conv2d, module.get_submodule(path)) for path in (first, second))
    (s, t), (u, v) = one.stride, two.kernel_size
    with torch.no_grad():
        # The first's kernel as images [in, mid, h, w], which the second's, spread, slides over.
        spread = two.weight.new_zeros(*two.weight.shape[:2], (u - 1) * s + 1, (v - 1) * t + 1)
        spread[:, :, ::s, ::t] = two.weight
        kernel = nn.functional.conv2d(
            one.weight.transpose(0, 1).double(), spread.flip(2, 3).double(),
            padding=(spread.shape[2] - 1, spread.shape[3] - 1),
        ).transpose(0, 1)  # fmt: skip
        made = nn.Conv2d(
            one.in_channels, two.out_channels, kernel.shape[2:],  # type: ignore[arg-type]
            (s * two.stride[0], t * two.stride[1]),
            (one.padding[0] + s * two.padding[0], one.padding[1] + t * two.padding[1]),  # type: ignore[arg-type, operator]
            bias=one.bias is not None or two.bias is not None,
            device=one.weight.device, dtype=one.weight.dtype,
        )  # fmt: skip
        made.weight = nn.Parameter(kernel.to(one.weight.dtype).contiguous())
        if made.bias is not None:
            bias = torch.zeros_like(made.bias) if two.bias is None else two.bias
            if one.bias is not None:
                bias = bias + two.weight.sum((2, 3)) @ one.bias
            made.bias = nn.Parameter(bias)
    for path, left in ((first, made.train(one.training)), (second, nn.Identity())):
        holder, name = parent_of(module, path)
        setattr(holder, name, left)
