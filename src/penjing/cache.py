"""Keys and values of attention in 8 or 4 bits, as a decoder's cache holds them.

    q = clip(round((x - offset) / scale), -2^(b-1), 2^(b-1) - 1)

with one scale and one offset for each channel of each head, keys as they are after the rotation
of their positions. The offsets cost nothing to undo: a constant added to all keys adds the same
to all scores of a query, which softmax does not see, and one added to all values comes out as it
went in, for the probabilities sum to 1. So a runtime's symmetric grid serves what is not
symmetric. (KIVI, Liu et al., arXiv 2402.02750, found that keys want scales by channel.)
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from penjing.errors import InputError

__all__ = ["BITS", "CacheGrid", "attention_layers", "rounded", "rounding_cache"]

BITS = (8, 4)
"""Bits of a stored key or value that runtimes have kernels for."""


@dataclass(frozen=True, eq=False)
class CacheGrid:
    """How the keys and values of one layer are stored.

    Attributes:
        bits: 8 or 4.
        key_scale, key_offset, value_scale, value_offset: float32 [kv heads, head width].

    Raises:
        InputError: other bits, shapes that do not agree, scales that are not above 0 and finite.
    """

    bits: int
    key_scale: Tensor
    key_offset: Tensor
    value_scale: Tensor
    value_offset: Tensor

    def __post_init__(self) -> None:
        if self.bits not in BITS:
            raise InputError("bits of a KV cache", got=self.bits, allowed="8 or 4")
        for scale, offset in (
            (self.key_scale, self.key_offset), (self.value_scale, self.value_offset),
        ):  # fmt: skip
            if scale.ndim != 2 or scale.shape != offset.shape:
                got = f"{tuple(scale.shape)} and {tuple(offset.shape)}"
                raise InputError("scales of a KV cache", got=got, allowed="[kv heads, head width]")
            if not bool((scale > 0).all() and torch.isfinite(torch.stack([scale, offset])).all()):
                raise InputError("scales of a KV cache", allowed="finite, and above 0")

    def keys(self, x: Tensor) -> Tensor:
        """Keys [batch, kv heads, length, head width] as they come back from the cache."""
        return _through(x, self.key_scale, self.key_offset, self.bits)

    def values(self, x: Tensor) -> Tensor:
        """The same for values."""
        return _through(x, self.value_scale, self.value_offset, self.bits)

    @property
    def bytes_per_token(self) -> float:
        """Of keys and values of one layer; scales and offsets are the network's."""
        return (self.key_scale.numel() + self.value_scale.numel()) * self.bits / 8

    def tensors(self) -> dict[str, Tensor]:
        """The four tensors by name."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name != "bits"}


def rounded(x: Tensor, scale: Tensor, offset: Tensor, bits: int) -> Tensor:
    """x as it comes back from codes of so many bits, float32; scale and offset broadcast to it."""
    half = 2 ** (bits - 1)
    codes = ((x.float() - offset) / scale).round_().clamp_(-half, half - 1)
    return codes * scale + offset


def _through(x: Tensor, scale: Tensor, offset: Tensor, bits: int) -> Tensor:
    """[batch, kv heads, length, head width]; scale and offset [kv heads, head width]."""
    scale, offset = (t.unsqueeze(1).to(x.device, torch.float32) for t in (scale, offset))
    made = rounded(x.detach(), scale, offset, bits).to(x.dtype)
    # Straight through: training sees the rounding and its gradient passes by it.
    return x + (made - x).detach() if x.requires_grad else made


def attention_layers(module: torch.nn.Module) -> dict[int, str]:
    """Path of each attention that has a place in the cache, by that place."""
    found: dict[int, str] = {}
    for path, part in module.named_modules():
        index = getattr(part, "layer_idx", None)
        # A decoder layer may carry the number too; its attention lies deeper.
        if isinstance(index, int):
            found[index] = path
    return found


def rounding_cache(module: torch.nn.Module, grids: Mapping[str, CacheGrid], store: bool) -> Any:
    """A `transformers` cache that rounds what enters it.

    Args:
        module: a decoder of `transformers`.
        grids: by path of an attention.
        store: False to give back only what came in with the call: for whole texts, which may
            then run through a block any number of times.
    """
    paths = attention_layers(module)
    return _cache_class()({i: grids[p] for i, p in paths.items() if p in grids}, store)


@functools.cache
def _cache_class() -> type:
    from transformers import DynamicCache

    class RoundingCache(DynamicCache):  # type: ignore[misc]
        def __init__(self, grids: Mapping[int, CacheGrid], store: bool) -> None:
            super().__init__()
            self._grids, self._store = grids, store

        def update(
            self, keys: Tensor, values: Tensor, layer_idx: int, *args: Any, **more: Any
        ) -> tuple[Tensor, Tensor]:
            if (grid := self._grids.get(layer_idx)) is not None:
                keys, values = grid.keys(keys), grid.values(values)
            if not self._store:
                return keys, values
            kept: tuple[Tensor, Tensor] = super().update(keys, values, layer_idx, *args, **more)
            return kept

    return RoundingCache
