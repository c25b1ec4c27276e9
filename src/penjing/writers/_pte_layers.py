"""Layers of a network that is lowered to XNNPACK, quantized as its kernels are.

XNNPACK multiplies 8-bit weights, one scale a row, by 8-bit inputs in two ways:

    qs8   a fixed range of the inputs, and the output rounded to a fixed range too
    qd8   a range of the inputs found at run time, between the least and the greatest of a row
          (of a sample, for convolutions), and the output in floats

A layer with a fixed input range whose output goes into a rounding alone, behind a ReLU or none,
is `closed`: qs8. The output of every other one stays in floats, so it is qd8, made to find the
range that was asked for: inputs are rounded to it, and two more channels of zero weight hold its
ends, which are then the least and the greatest there are. Measured on layers of 384 x 384 and
384 x 1536 with 128 rows: 0.13 and 0.42 ms in place of 0.11 and 0.40; float32 takes 0.36 and 1.5.

Weights of 4 bits with a scale for every 32 inputs (or a multiple) are qd8 alone; XNNPACK holds
their scales in bfloat16.
"""

from __future__ import annotations

from collections.abc import Callable, Set
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.ao.quantization.fx import _decomposed  # noqa: F401  defines the operators
from torch.nn import functional

from penjing.errors import UsageError
from penjing.graph import given
from penjing.model import Model
from penjing.planes import IntegerPlanes
from penjing.recipe import ActivationRange

__all__ = ["convolves", "opens", "place", "reason"]

_OPS = torch.ops.quantized_decomposed
_LOW, _HIGH = -128, 127
_BLOCK = 32


def reason(planes: IntegerPlanes, layer: nn.Module) -> str | None:
    """Why XNNPACK cannot hold this weight, None where it can."""
    if isinstance(layer, nn.Embedding):
        if planes.is_integer and max(planes.bits) <= 8 and planes.rotation is None:
            return None
        return f"a table of {planes.kind}"
    if planes.rotation is not None:
        return "rotated inputs"
    if planes.signed is not None or (isinstance(layer, nn.Linear) and _blocks(planes)):
        return None
    allowed = f"symmetric 8 or 7 bits, a scale a row; linear layers also 4, one a {_BLOCK} inputs"
    return f"{planes.kind}, not of the kernels: {allowed}"


def opens(layer: nn.Module) -> bool:
    """Whether there is a kernel of 8-bit inputs with an output in floats."""
    return isinstance(layer, nn.Linear) or (isinstance(layer, nn.Conv2d) and layer.groups == 1)


def convolves(layer: nn.Module) -> bool:
    """Whether it is a convolution that XNNPACK has."""
    return isinstance(layer, nn.Conv1d | nn.Conv2d)


def place(model: Model, closed: Set[str]) -> None:
    """Put integers and rounding into the layers of `model`, which must be a copy, in place.

    Args:
        model: that the planes and ranges are of.
        closed: paths of layers with a fixed input range whose output is rounded too.
    """
    owners: dict[int, list[tuple[str, nn.Module]]] = {}
    for path, layer in model.module.named_modules():
        weight = getattr(layer, "weight", None)
        if isinstance(weight, nn.Parameter):
            owners.setdefault(id(weight), []).append((path, layer))
    for name, planes in model.planes.items():
        for path, layer in owners[id(model.module.get_parameter(name))]:
            if isinstance(layer, nn.Embedding):
                _hold_table(layer, planes)
                continue
            found = model.activations.get(path)
            if found is not None:
                layer._forward_pre_hooks.clear()
            rounds, ends = _rounding(layer, found, path in closed)
            _hold_weight(layer, planes, ends=ends)
            _enter(layer, rounds)
            if path in model.outputs:
                layer._forward_hooks.clear()
                _leave(layer, model.outputs[path])


def _blocks(planes: IntegerPlanes) -> bool:
    """Whether this is one plane of 4 bits in groups, symmetric."""
    whole = planes.group % _BLOCK == 0 and planes.inputs % planes.group == 0
    if not planes.is_integer or planes.bits != (4,) or not whole:
        return False
    return bool((planes.zero_point == 8).all())


def _hold_weight(layer: nn.Module, planes: IntegerPlanes, *, ends: bool) -> None:
    """Integers in place of the weight; with `ends` two more input channels, of zeros."""
    if planes.signed is not None:
        codes = planes.signed.reshape(planes.shape)
        layer.register_buffer("scales", planes.scale[0, :, 0].contiguous())
    else:
        codes = (planes.codes[0].to(torch.int16) - 8).to(torch.int8)
        layer.register_buffer("scales", planes.scale[0].contiguous())
        layer.block = planes.group  # type: ignore[assignment]
    if ends:
        codes = functional.pad(codes, (*[0, 0] * (codes.ndim - 2), 0, 2))
    layer.register_buffer("codes", codes.contiguous())
    layer.register_buffer("zeros", torch.zeros_like(cast(Tensor, layer.scales), dtype=torch.int64))
    del layer._parameters["weight"]
    kind = type(layer)
    # The layer's own forward asks for its weight, whatever else it does.
    layer.__class__ = type(kind.__name__, (kind,), {"weight": property(_weight)})


def _weight(layer: Any) -> Tensor:
    if layer.scales.ndim > 1:
        return cast(
            Tensor,
            _OPS.dequantize_per_channel_group.default(
                layer.codes, layer.scales, layer.zeros, -8, 7, torch.int8, layer.block,
                torch.float32,
            ),
        )  # fmt: skip
    return cast(
        Tensor,
        _OPS.dequantize_per_channel.default(
            layer.codes, layer.scales, layer.zeros, 0, _LOW, _HIGH, torch.int8
        ),
    )


def _rounding(
    layer: nn.Module, found: ActivationRange | None, closed: bool
) -> tuple[Callable[[Tensor], Tensor], bool]:
    """What is done to a layer's input, and whether it gets the ends of the range as channels."""
    at_run_time = _rows if isinstance(layer, nn.Linear) else _sample
    factor = None if found is None else found.factor

    def divided(x: Tensor) -> Tensor:
        return x if factor is None else x * factor

    if found is None or not found.scale:
        return (lambda x: at_run_time(divided(x))), False
    if closed:
        return (lambda x: _fixed(divided(x), found)), False
    low, high = -found.zero_point * found.scale, (255 - found.zero_point) * found.scale

    def rounds(x: Tensor) -> Tensor:
        # Rounded once, and found on the same grid again: a closed layer before it needs the first.
        x = _fixed(divided(x), found)
        if isinstance(layer, nn.Linear):  # [..., in] to [..., in + 2]
            x = torch.cat([x, torch.tensor([low, high]).expand(*x.shape[:-1], 2)], -1)
        else:  # [batch, in, height, width] to [batch, in + 2, height, width]
            ends = torch.tensor([low, high]).reshape(1, 2, 1, 1)
            x = torch.cat([x, ends.expand(x.shape[0], 2, *x.shape[2:])], 1)
        return at_run_time(x)

    return rounds, True


def _fixed(x: Tensor, found: ActivationRange) -> Tensor:
    grid = (found.scale, found.zero_point + _LOW, _LOW, _HIGH, torch.int8)
    codes = _OPS.quantize_per_tensor.default(x, *grid)
    return cast(Tensor, _OPS.dequantize_per_tensor.default(codes, *grid))


def _rows(x: Tensor) -> Tensor:
    scale, zero = _OPS.choose_qparams_per_token_asymmetric.default(x, torch.int8)
    grid = (scale, zero, _LOW, _HIGH, torch.int8)
    codes = _OPS.quantize_per_token.default(x, *grid)
    return cast(Tensor, _OPS.dequantize_per_token.default(codes, *grid, torch.float32))


def _sample(x: Tensor) -> Tensor:
    scale, zero = _OPS.choose_qparams.tensor(x, _LOW, _HIGH, 1e-12, torch.int8)
    grid = (scale, zero, _LOW, _HIGH, torch.int8)
    codes = _OPS.quantize_per_tensor.tensor(x, *grid)
    return cast(Tensor, _OPS.dequantize_per_tensor.tensor(codes, *grid))


def _enter(layer: nn.Module, rounds: Callable[[Tensor], Tensor]) -> None:
    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return (rounds(given(args, kwargs)), *args[1:]), kwargs if args else {}

    layer.register_forward_pre_hook(hook, with_kwargs=True)


def _leave(layer: nn.Module, found: ActivationRange) -> None:
    layer.register_forward_hook(lambda _, __, output: _fixed(output, found))


def _hold_table(layer: nn.Embedding, planes: IntegerPlanes) -> None:
    """A table in 8 or 4 bits, two codes of 4 in a byte, and its rows made of them when read.

    XNNPACK has no tables; these are the runtime's portable operators.
    """
    if type(layer).forward is not nn.Embedding.forward:
        raise UsageError("a quantized table whose class has a forward of its own", got=type(layer))
    codes = planes.codes.to(torch.uint8)  # [planes, rows, width]
    width = codes.shape[2]
    packed = max(planes.bits) <= 4 and width % 2 == 0
    if packed:
        codes = codes[..., ::2] | codes[..., 1::2] << 4
    group = min(planes.group, width)
    count = len(codes)

    def read(ids: Tensor) -> Tensor:
        total = functional.embedding(ids, layer.shift)  # type: ignore[arg-type]
        total = total.repeat_interleave(group, -1)[..., :width]
        for k in range(count):
            code = functional.embedding(ids, getattr(layer, f"codes{k}")).float()
            if packed:  # no operator of the runtime shifts bits
                high = torch.floor(code / 16)
                code = torch.stack([code - 16 * high, high], -1).flatten(-2)
            scale = functional.embedding(ids, getattr(layer, f"scale{k}"))
            total = total + code * scale.repeat_interleave(group, -1)[..., :width]
        return total

    layer.register_buffer("shift", planes.shift.contiguous())
    for k in range(count):
        layer.register_buffer(f"codes{k}", codes[k].contiguous())
        layer.register_buffer(f"scale{k}", planes.scale[k].contiguous())
    del layer._parameters["weight"]
    layer.forward = read  # type: ignore[method-assign, assignment]
