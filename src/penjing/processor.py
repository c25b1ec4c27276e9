"""What this processor's arithmetic is good for; asked, not timed, so that runs can be repeated.

Without VNNI an x86 processor multiplies bytes with `vpmaddubsw`, which adds two products of an
unsigned and a signed byte in 16 bits and saturates: 255 * 127 * 2 > 32767. onnxruntime and
OpenVINO use it, so 8-bit weights times 8-bit inputs go wrong there, by a quarter and more of the
output on dense random codes. With 7 bits of weights, 255 * 64 * 2 < 32767, every sum is exact.
"""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch

__all__ = ["autocast", "has_bfloat16", "weight_bits"]

_BYTE_PRODUCTS = ("avx512_vnni", "avx_vnni", "amx_int8")
_BFLOAT16 = ("avx512_bf16", "amx_bf16", "bf16")


def _capabilities() -> dict[str, object]:
    return dict(torch.cpu.get_capabilities())


def weight_bits() -> int:
    """Bits of a weight whose products with unsigned 8-bit inputs are added exactly: 8, or 7."""
    able = _capabilities()
    x86 = str(able.get("architecture", "")).startswith("x86")
    return 7 if x86 and not any(able.get(flag) for flag in _BYTE_PRODUCTS) else 8


def has_bfloat16(device: str = "cpu") -> bool:
    """Whether bfloat16 products are faster than float32's; emulated ones are ten times slower."""
    if device == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return device != "cpu" or any(_capabilities().get(flag) for flag in _BFLOAT16)


def autocast(
    device: str, enabled: bool = True, *, cache: bool = True
) -> AbstractContextManager[object]:
    """Products in bfloat16 where that is fast, else nothing.

    Args:
        device: type of the device, e.g. `cpu`.
        enabled: False for nothing.
        cache: keep cast weights until the end of the context.
    """
    wanted = enabled and has_bfloat16(device)
    return torch.autocast(device, torch.bfloat16, enabled=wanted, cache_enabled=cache)
