"""Statistics of the inputs of layers, gathered call by call."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from penjing.errors import InputError
from penjing.linalg import Cross, Gram, Sums, state
from penjing.patches import Patches, is_grouped

# Input vectors sampled from a batch, and in all, to choose a range by.
_SAMPLE, _SAMPLES = 256, 8192
# About so many of the patches of a batch count.
_ROWS = 4096

__all__ = ["Collector", "Gradient", "LayerStats", "unpadded"]


@dataclass(frozen=True, eq=False)
class Gradient:
    """What the loss of the whole network says of one layer's weight (`penjing.gradients`).

    Attributes:
        size: [out, in] mean over samples of |g|, g the slope of a sample's loss by the weight.
        square: [out, in] mean over samples of g^2.
        effects: [samples, in] sum over outputs of weight * g, to first order what a sample's loss
            falls by when the input is silenced.
    """

    size: Tensor
    square: Tensor
    effects: Tensor


@dataclass
class LayerStats:
    """Statistics of the input of one layer.

    Attributes:
        gram: [in, in] mean outer product, float64; None where it was not asked for.
        cross: [in, in] mean outer product of the reference's inputs (rows) and these (columns).
        norm: [in] root mean square of each input.
        size: [in] mean absolute value of each input, with `size`.
        gradient: of the layer's weight in the network before the step, with `gradient`.
        fisher: [out, out] Fisher information of the layer's outputs there, with `fisher`
            (`penjing.gradients`); [out] with `fisher-diagonal`.
        grams: of a grouped convolution in place of `gram`: [groups, row, row], row = in / groups
            * h * w, mean outer product of the patches of each group.
        mean: [in] mean of each input, float64, with `gram`; with `grams` [groups, row].
        was: the same of the reference's inputs, with `cross`.
        low, high: range of all values seen.
        lows, highs: [channels], range of each input channel, with `range`.
        rows: [n, channels], a sample of input vectors spread over the data, with `range`; of a
            convolution the channels at a place, without its kernel's neighbourhood.
        count: input vectors seen; 0 where the layer was never run.
    """

    gram: Tensor | None = None
    grams: Tensor | None = None
    norm: Tensor | None = None
    size: Tensor | None = None
    gradient: Gradient | None = None
    fisher: Tensor | None = None
    cross: Tensor | None = None
    mean: Tensor | None = None
    was: Tensor | None = None
    low: float = 0.0
    high: float = 0.0
    count: int = 0
    lows: Tensor | None = None
    highs: Tensor | None = None
    rows: Tensor | None = None


class Collector:
    """Statistics of the inputs that layers get, and of those that they got before the edits.

    Args:
        layers: by path; embeddings have no statistics.
        needs: any of `gram`, `range`, `cross`, `size`.
        twins: the same layers in the network before the edits.
    """

    def __init__(
        self, layers: Mapping[str, nn.Module], needs: frozenset[str],
        twins: Mapping[str, nn.Module],
    ) -> None:  # fmt: skip
        self.layers = {n: m for n, m in layers.items() if not isinstance(m, nn.Embedding)}
        self.twins = {n: twins[n] for n in self.layers if n in twins}
        self._needs = needs
        self._mask: Tensor | None = None
        self._stats = {name: LayerStats() for name in self.layers}
        self._grams: dict[str, Gram] = {}
        self._crosses: dict[str, Cross] = {}
        # Of grouped convolutions, of this network and of the one before.
        self._patches: dict[tuple[str, bool], Patches] = {}
        self._seen: dict[str, list[tuple[Tensor, tuple[int, ...]]]] = {}
        # Layers that read one tensor share its rows and their sums within a batch.
        # The tensors are kept with them, so that no address is used twice.
        self._shared: dict[tuple[int, ...], tuple[Tensor, Tensor]] = {}
        self._sums: tuple[Sums, Sums] = {}, {}

    def begin(self, mask: Tensor | None) -> None:
        """The next batch, with its attention mask [batch, length]."""
        self._mask = mask
        for known in (self._seen, self._shared, *self._sums):
            known.clear()

    def before(self, name: str, x: Tensor) -> None:
        """An input that the layer of this name had before the edits."""
        module = self.twins[name]
        self._add_patches(name, module, x, twin=True)
        if (rows := _vectors(module, self._rows(module, x, twin=True))) is not None:
            self._seen.setdefault(name, []).append((rows, state(rows)))

    def now(self, name: str, x: Tensor) -> None:
        """An input that it has; that of before is added first.

        Raises:
            InputError: a value is NaN or infinite.
        """
        module = self.layers[name]
        own, both = self._sums if isinstance(module, nn.Linear) else (None, None)
        self._add_patches(name, module, x, twin=False)
        rows = _update(
            name, module, self._rows(module, x, twin=False), self._stats[name], self._grams,
            self._needs, own,
        )  # fmt: skip
        if rows is not None and (before := self._seen.get(name)):
            was, then = before.pop(0)
            if was.shape == rows.shape and state(was) == then:  # not changed in place since
                self._crosses.setdefault(name, Cross(rows.shape[1])).add(was, rows, both)

    def stats(self) -> dict[str, LayerStats]:
        """By path. A layer whose input had another width before has no `cross`."""
        stats = self._stats
        for name, gram in self._grams.items():
            own = stats[name]
            own.gram, own.norm, own.mean = gram.matrix, gram.norm, gram.mean
        for (name, twin), known in self._patches.items():
            if not twin:
                stats[name].grams, stats[name].mean = known.grams, known.mean
            elif (now := self._patches.get((name, False))) and now.mean.shape == known.mean.shape:
                stats[name].was = known.mean
        for name, cross in self._crosses.items():
            if cross.count == self._grams[name].count:  # every row had its pair
                stats[name].cross, stats[name].was = cross.matrix, cross.mean
        return stats

    def _rows(self, module: nn.Module, x: Tensor, *, twin: bool) -> Tensor:
        if not isinstance(module, nn.Linear):
            return x
        key = int(twin), *state(x)
        if key not in self._shared:
            self._shared[key] = x, unpadded(x, self._mask)
        return self._shared[key][1]

    def _add_patches(self, name: str, module: nn.Module, x: Tensor, *, twin: bool) -> None:
        if "gram" in self._needs and is_grouped(module) and x.numel():
            self._patches.setdefault((name, twin), Patches()).add(module, x)


def unpadded(x: Tensor, mask: Tensor | None) -> Tensor:
    if mask is not None and x.ndim == 3 and x.shape[:2] == mask.shape:
        return x[mask.bool()]  # [tokens, width]
    return x.reshape(-1, x.shape[-1])


def _update(
    name: str,
    layer: nn.Module,
    x: Tensor,
    stats: LayerStats,
    grams: dict[str, Gram],
    needs: frozenset[str],
    sums: Sums | None,
) -> Tensor | None:
    if not x.numel():  # an expert that no token was sent to
        return None
    low, high = float(x.amin()), float(x.amax())
    if not (torch.isfinite(torch.tensor([low, high])).all()):
        raise InputError(
            f"the input of {name} is NaN or infinite on the calibration data",
            next="check the data and the model's precision",
        )
    stats.low = min(stats.low, low)
    stats.high = max(stats.high, high)
    if "range" in needs:
        _range(layer, x, stats)
    vectors = _vectors(layer, x) if needs & {"gram", "size"} else None
    seen, now = stats.count, len(x) if vectors is None else len(vectors)
    stats.count += now
    if vectors is not None and "size" in needs:
        size = vectors.detach().abs().mean(0, dtype=torch.float64)  # [in]
        before = torch.zeros_like(size) if stats.size is None else stats.size
        stats.size = before + (size - before) * (now / (seen + now))
    if vectors is not None and "gram" in needs:
        if name not in grams:
            grams[name] = Gram(vectors.shape[1])
        grams[name].add(vectors, sums)
    return vectors


def _range(layer: nn.Module, x: Tensor, stats: LayerStats) -> None:
    if isinstance(layer, nn.Conv1d | nn.Conv2d):
        x = x.movedim(1, -1)
    rows = x.detach().reshape(-1, x.shape[-1])  # [n, channels]
    lows, highs = rows.amin(0), rows.amax(0)
    # A prime step, so that a convolution's places do not all come from one column.
    step = max(1, len(rows) // _SAMPLE)
    sample = rows[:: next(p for p in itertools.count(step) if _is_prime(p))].clone()
    if stats.lows is not None and stats.highs is not None and stats.rows is not None:
        lows, highs = torch.minimum(lows, stats.lows), torch.maximum(highs, stats.highs)
        sample = torch.cat([stats.rows, sample])
        if len(sample) > _SAMPLES:
            sample = sample[::2].clone()
    stats.lows, stats.highs, stats.rows = lows, highs, sample


def _is_prime(number: int) -> bool:
    return number == 1 or all(number % k for k in range(2, int(number**0.5) + 1))


def _vectors(layer: nn.Module, x: Tensor) -> Tensor | None:
    """Input as rows that the weight matrix [out, in] multiplies; None for grouped convolutions."""
    if isinstance(layer, nn.Linear):
        return x.reshape(-1, x.shape[-1])  # [tokens, in]
    if isinstance(layer, nn.Conv1d | nn.Conv2d) and layer.groups == 1:
        kernel, dilation, stride = layer.kernel_size, layer.dilation, layer.stride
        padding = (0,) * len(kernel) if isinstance(layer.padding, str) else layer.padding
        if isinstance(layer, nn.Conv1d):  # as an image of one row
            x = x.unsqueeze(-2)
            kernel, dilation, stride = (1, *kernel), (1, *dilation), (1, *stride)
            padding = (0, *padding)
        return _patches(x, kernel, dilation, padding, stride)
    return None


def _patches(
    x: Tensor, kernel: Sequence[int], dilation: Sequence[int], padding: Sequence[int],
    stride: Sequence[int],
) -> Tensor:  # fmt: skip
    """Of all that a kernel sees in images [batch, in, height, width] some, evenly spread.

    Returns:
        [rows, in * h * w], of the places of one image after those of another.
    """
    x = nn.functional.pad(x, (padding[1], padding[1], padding[0], padding[0]))
    for dim, size, apart, step in zip((2, 3), kernel, dilation, stride, strict=True):
        x = x.unfold(dim, (size - 1) * apart + 1, step)[..., ::apart]  # a view
    count = len(x) * x.shape[2] * x.shape[3]
    chosen = torch.arange(0, count, max(1, count // _ROWS), device=x.device)
    image, place = chosen // (count // len(x)), chosen % (count // len(x))
    return x[image, :, place // x.shape[3], place % x.shape[3]].flatten(1)
