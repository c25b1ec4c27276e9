"""Which layers to leave in floats: a run of them from the input on.

The first layers of a network see the fewest channels, and what 8-bit inputs do to them all later
ones inherit. Each layer's input alone is rounded to 8 bits (the range seen), and its harm is what
that does to the outputs: KL of logits in nats, 1 - cosine of embeddings. Left are the first layers,
as few as spare nearly all of the harm that can be spared for the share that may be spent: one
run, because an integer product between two float ones gains nothing and has both to convert.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from penjing.edits import perform
from penjing.errors import UsageError
from penjing.graph import given
from penjing.meter import Meter, hooked
from penjing.model import Batch, Model
from penjing.recipe import ActivationRange, Edit
from penjing.registry import lookup

__all__ = ["in_floats"]


# Of the harm that the longest run spares, what a shorter one must.
_NEARLY = 0.9


@torch.no_grad()
def in_floats(model: Model, batches: Sequence[Batch], share: float) -> tuple[str, ...]:
    """Paths of the layers to skip, in the order they run.

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
    prices, ranges = _prices(twin, layers), _ranges(twin, layers, batches)
    run, spent = [], torch.zeros(2, dtype=torch.float64)
    for path in ranges:
        spent += prices[path]
        if bool((spent > share + 1e-9).any()):
            break
        run.append(path)
    wanted = [model.run(batch) for batch in batches]
    loss = lookup("losses", model.suited_loss, "loss")
    spared: list[float] = []
    for path in run:
        low, high = ranges[path]
        scale = (high - low) / 255 or 1.0
        perform(twin, Edit("activation", path, ActivationRange(scale, round(-low / scale)), ""))
        harm = sum(float(loss(twin.run(b), w)) for b, w in zip(batches, wanted, strict=True))
        layers[path].penjing_range = None  # type: ignore[assignment]
        spared.append(harm + (spared[-1] if spared else 0.0))
    return tuple(run[: 1 + sum(s < _NEARLY * spared[-1] for s in spared)])


_KINDS = (nn.Linear, nn.Conv1d, nn.Conv2d)


def _prices(model: Model, layers: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """Shares of all multiplications (time) and of all weights (bytes), float64 [2]."""
    meter = Meter(model.module)
    with hooked(model.module, meter.enter, meter.leave), meter:
        model.run(model.example)
    sizes = {path: layer.weight.numel() for path, layer in layers.items()}  # type: ignore[operator]
    whole = torch.tensor([sum(meter.macs.values()), sum(sizes.values())], dtype=torch.float64)
    return {
        path: torch.tensor([meter.macs[path], sizes[path]], dtype=torch.float64)
        / whole.clamp_min(1)
        for path in layers
    }


def _ranges(
    model: Model, layers: Mapping[str, nn.Module], batches: Sequence[Batch]
) -> dict[str, tuple[float, float]]:
    """Lowest and highest input of each layer that runs, zero among them, in the order they run."""
    found: dict[str, tuple[float, float]] = {}
    handles = []
    for path, layer in layers.items():

        def see(_: nn.Module, args: Any, kwargs: Any, path: str = path) -> None:
            x, (low, high) = given(args, kwargs), found.get(path, (0.0, 0.0))
            found[path] = min(low, float(x.min())), max(high, float(x.max()))

        handles.append(layer.register_forward_pre_hook(see, with_kwargs=True, prepend=True))
    try:
        for batch in batches:
            model.run(batch)
    finally:
        for handle in handles:
            handle.remove()
    return found
