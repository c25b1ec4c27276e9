"""Which layers to leave in floats: those that cost the outputs most for what they cost.

Each layer alone gets 8-bit weights (rounded to nearest, a scale a row) and 8-bit inputs (the range
seen), and d is what that does to the outputs: KL of logits in nats, 1 - cosine of embeddings. Its
price is the larger of its shares of all multiplications (time) and of all weights (bytes). Layers
are taken by d over price while the prices fit into what may be spent.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from penjing.edits import perform
from penjing.errors import UsageError
from penjing.meter import Meter, hooked
from penjing.model import Batch, Model
from penjing.recipe import ActivationRange, Edit
from penjing.registry import lookup
from penjing.scheme import Scheme

__all__ = ["in_floats"]


@torch.no_grad()
def in_floats(model: Model, batches: Sequence[Batch], share: float) -> tuple[str, ...]:
    """Paths of the layers to skip, in the order of the network.

    Args:
        model: in floats; stays as it is. Batch norms should be folded.
        batches: calibration data; a few dozen samples rank the layers.
        share: of multiplications and of weights that may stay in floats, 0 to 1.

    Raises:
        UsageError: a share out of range, or no data.
    """
    if not 0 <= share <= 1:
        raise UsageError("share left in floats", got=share, allowed="0 to 1")
    if not share:
        return ()
    if not batches:
        raise UsageError("what to leave in floats needs data", next="give --data")
    twin = model.copy()
    layers = {n: m for n, m in twin.module.named_modules() if isinstance(m, _KINDS)}
    price, ranges = _prices(twin, layers), _ranges(twin, layers, batches)
    wanted = [model.run(batch) for batch in batches]
    loss = lookup("losses", "cosine" if model.interface == "embedding" else "kl", "loss")
    worth = {}
    for path, (low, high) in ranges.items():
        weight: Tensor = layers[path].weight.data
        kept = weight.clone()
        scale = (high - low) / 255 or 1.0
        grid = ActivationRange(scale, round(-low / scale))
        perform(twin, Edit("activation", path, grid, ""))
        planes = lookup("quantizers", "rtn", "fit")(kept.flatten(1), Scheme(8, 0, True))
        weight.copy_(planes.dequantize().reshape(kept.shape))
        harm = sum(float(loss(twin.run(b), w)) for b, w in zip(batches, wanted, strict=True))
        weight.copy_(kept)
        layers[path].penjing_range = None  # type: ignore[assignment]
        worth[path] = harm / max(price[path], 1e-12)
    chosen, left = set(), share
    for path in sorted(worth, key=lambda p: -worth[p]):
        if price[path] <= left:
            chosen.add(path)
            left -= price[path]
    return tuple(path for path in layers if path in chosen)


_KINDS = (nn.Linear, nn.Conv1d, nn.Conv2d)


def _prices(model: Model, layers: Mapping[str, nn.Module]) -> dict[str, float]:
    meter = Meter(model.module)
    with hooked(model.module, meter.enter, meter.leave), meter:
        model.run(model.example)
    sizes = {path: layer.weight.numel() for path, layer in layers.items()}  # type: ignore[operator]
    macs, weights = max(sum(meter.macs.values()), 1), max(sum(sizes.values()), 1)
    return {path: max(meter.macs[path] / macs, sizes[path] / weights) for path in layers}


def _ranges(
    model: Model, layers: Mapping[str, nn.Module], batches: Sequence[Batch]
) -> dict[str, tuple[float, float]]:
    """Lowest and highest input of each layer that runs, zero among them."""
    found: dict[str, tuple[float, float]] = {}
    handles = []
    for path, layer in layers.items():

        def see(_: nn.Module, args: tuple[Tensor, ...], path: str = path) -> None:
            low, high = found.get(path, (0.0, 0.0))
            found[path] = min(low, float(args[0].min())), max(high, float(args[0].max()))

        handles.append(layer.register_forward_pre_hook(see, prepend=True))
    try:
        for batch in batches:
            model.run(batch)
    finally:
        for handle in handles:
            handle.remove()
    return found
