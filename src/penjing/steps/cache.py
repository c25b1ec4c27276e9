"""Cache: the keys and values that a decoder keeps of earlier tokens, in 8 or 4 bits.

Ranges are of calibration text run through the network as it stands; each end of a channel's range
is drawn in to the least squared error. A text's first token counts for a fifth of all: its keys
and values are like no other's, few, and attended to by all (the attention sink, Xiao et al., arXiv
2309.17453, section 3.1). What the grids mean: `penjing.cache`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from penjing.cache import BITS, CacheGrid, attention_layers, rounded
from penjing.calibrate import LayerStats, Unit
from penjing.errors import InputError, UsageError
from penjing.model import Batch, Model
from penjing.recipe import Edit
from penjing.steps._select import matches

__all__ = ["Cache", "check_decoder"]

_TOKENS = 4096  # of each layer, spread over the data
_SHRINK = 0.5 + 0.5 * torch.arange(32).flip(0) / 31  # factors of a range's end
_FIRST = 0.2  # of all weight, on the first tokens
_ROWS = 1 << 22  # numbers looked at together


@dataclass(frozen=True)
class Cache:
    """Round keys and values, one scale and offset a channel.

    Attributes:
        bits: 8 or 4.
        targets: globs of paths of attentions; without any, all.
    """

    name: ClassVar[str] = "cache"
    scope: ClassVar[str] = "model"
    needs: ClassVar[frozenset[str]] = frozenset({"range"})

    bits: int = 8
    targets: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.bits not in BITS:
            raise UsageError("bits of a KV cache", got=self.bits, allowed="8 or 4")

    def plan(self, unit: Unit, stats: dict[str, LayerStats]) -> Iterator[Edit]:
        """One grid a layer.

        Raises:
            UsageError: a network without a cache.
            InputError: no data, or keys that are not finite.
        """
        model = unit.model
        paths = {
            place: path
            for place, path in check_decoder(model).items()
            if matches(path, self.targets)
        }
        if not paths:
            raise InputError(
                "the targets of cache match no attention", got=", ".join(self.targets),
                allowed=f"globs of paths such as {next(iter(check_decoder(model).values()))}",
            )  # fmt: skip
        if not unit.batches:
            raise InputError("ranges of a KV cache need data", next="give calibration data")
        layers, weight = _record(model, unit.batches)
        for index, (keys, values) in sorted(layers.items()):
            if index not in paths:
                continue
            key_scale, key_offset = grid(keys, self.bits, weight)
            value_scale, value_offset = grid(values, self.bits, weight)
            found = CacheGrid(self.bits, key_scale, key_offset, value_scale, value_offset)
            errors = {
                "key_error": _error(keys, found.keys(keys.transpose(0, 1)).transpose(0, 1)),
                "value_error": _error(values, found.values(values.transpose(0, 1)).transpose(0, 1)),
            }
            why = f"keys and values in {self.bits} bits, a scale and an offset a channel"
            yield Edit("cache", paths[index], found, why, errors)


def check_decoder(model: Model) -> dict[int, str]:
    """Path of each attention that has a place in the cache, by that place.

    Raises:
        UsageError: a network without a cache.
    """
    paths = attention_layers(model.module) if model.interface == "causal" else {}
    if not paths:
        raise UsageError(
            "a KV cache in integers", got=f"a network with the interface {model.interface}",
            allowed="a decoder of transformers", next="leave --kv-cache out",
        )  # fmt: skip
    return paths


def grid(x: Tensor, bits: int, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Scale and offset [heads, width] of least squared error.

    Args:
        x: [tokens, heads, width].
        bits: of a code.
        weight: [tokens], of the squared errors.

    Raises:
        InputError: NaN or infinite values.
    """
    if not bool(torch.isfinite(x).all()):
        raise InputError(
            "keys or values of calibration are NaN or infinite", next="check the model and the data"
        )
    flat = x.flatten(1).T.contiguous()  # [channels, tokens]
    scales, offsets = [], []
    for rows in torch.split(flat, max(1, _ROWS // max(1, flat.shape[1]))):
        low, high = rows.amin(1), rows.amax(1)
        middle = (low + high) / 2
        # The ends in turn, twice: the best of one depends on where the other is.
        for _ in range(2):
            lows = [(middle - f * (middle - low), high) for f in _SHRINK]
            low = _drawn(rows, bits, weight, lows)[0]
            highs = [(low, middle + f * (high - middle)) for f in _SHRINK]
            high = _drawn(rows, bits, weight, highs)[1]
        scale, offset = _between(low, high, bits)
        scales.append(scale)
        offsets.append(offset)
    return torch.cat(scales).reshape(x.shape[1:]), torch.cat(offsets).reshape(x.shape[1:])


def _between(low: Tensor, high: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """The grid whose first code is `low` and whose last is `high`."""
    # A channel that never changes is its offset, and any scale will do.
    width = torch.where(high > low, high - low, torch.ones_like(low))
    scale = (width / (2**bits - 1)).float()
    return scale, (low + 2 ** (bits - 1) * scale).float()


def _drawn(
    rows: Tensor, bits: int, weight: Tensor, ends: Sequence[tuple[Tensor, Tensor]]
) -> tuple[Tensor, Tensor]:
    """Of some ranges those with the least squared error, row by row."""
    best, found = torch.full((len(rows),), torch.inf), ends[0]
    for low, high in ends:
        scale, offset = (t.unsqueeze(1) for t in _between(low, high, bits))
        error = (rounded(rows, scale, offset, bits) - rows).square() @ weight
        better = error < best
        best = torch.where(better, error, best)
        found = (torch.where(better, low, found[0]), torch.where(better, high, found[1]))
    return found


def _error(x: Tensor, made: Tensor) -> float:
    return float((made - x).norm() / x.norm().clamp_min(1e-12))


def _record(
    model: Model, batches: Sequence[Batch]
) -> tuple[dict[int, tuple[Tensor, Tensor]], Tensor]:
    """Keys and values [tokens, heads, width] of each layer, and the tokens' weights [tokens].

    First tokens of texts, and the others evenly drawn.
    """
    from transformers import DynamicCache

    total = sum(int(_kept(model, batch).sum()) for batch in batches)
    step = max(1, total // _TOKENS)
    parts: dict[int, list[tuple[Tensor, Tensor]]] = {}
    firsts = []
    for batch in batches:
        kept = _kept(model, batch)  # [batch, length]
        first = kept & (kept.cumsum(1) == 1)
        every = kept.flatten().nonzero().squeeze(1)
        chosen = torch.unique(torch.cat([every[::step], first.flatten().nonzero().squeeze(1)]))
        firsts.append(first.flatten()[chosen])
        cache: Any = DynamicCache()
        with torch.no_grad():
            inputs = {name: batch[name] for name in model.example}
            model.module(**inputs, past_key_values=cache, use_cache=True)
        for index, layer in enumerate(cache.layers):
            keys, values = (
                t.transpose(1, 2).flatten(0, 1)[chosen].float().cpu()
                for t in (layer.keys, layer.values)
            )
            parts.setdefault(index, []).append((keys, values))
    made = {
        i: (torch.cat([k for k, _ in pairs]), torch.cat([v for _, v in pairs]))
        for i, pairs in parts.items()
    }
    is_first = torch.cat(firsts).cpu()
    ones, rest = int(is_first.sum()), int((~is_first).sum())
    share = _FIRST if rest else 1.0  # every text has a first token
    weight = torch.where(is_first, share / max(ones, 1), (1 - share) / max(rest, 1))
    return made, weight.float()


def _kept(model: Model, batch: Batch) -> Tensor:
    """[batch, length], whether a token is one, not padding."""
    mask = batch.get("attention_mask")
    return torch.ones_like(batch["input_ids"]).bool() if mask is None else mask.bool()
