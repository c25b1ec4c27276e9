"""Attention: queries and keys as 8-bit integers, where a runtime multiplies them as such.

The outputs of the layers that make them are rounded to one symmetric grid each, after the bias:
what lies between there and the product (heads, transpositions, a constant scale) moves through a
scale. Values and the softmax stay in floats.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

from penjing.calibrate import LayerStats, Unit
from penjing.errors import InputError, UsageError
from penjing.histogram import Histogram
from penjing.layerstats import unpadded
from penjing.model import Batch, Model
from penjing.recipe import ActivationRange, Edit
from penjing.registry import lookup
from penjing.steps._select import matches

__all__ = ["Attention", "multiplied"]

_PRODUCTS = {scaled_dot_product_attention, torch.matmul, torch.bmm, Tensor.matmul, Tensor.bmm,
             Tensor.__matmul__}  # fmt: skip


@dataclass(frozen=True)
class Attention:
    """Round queries and keys, one symmetric grid a layer that makes them.

    Attributes:
        observer: how a range is chosen, a name of `penjing.observers`.
        targets: globs of paths of layers; without any, all that make queries or keys.
    """

    name: ClassVar[str] = "attention"
    scope: ClassVar[str] = "model"
    needs: ClassVar[frozenset[str]] = frozenset({"range"})

    observer: str = "mse"
    targets: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        lookup("observers", self.observer, "fit")

    def plan(self, unit: Unit, stats: dict[str, LayerStats]) -> Iterator[Edit]:
        """One range a layer.

        Raises:
            UsageError: no attention multiplies the outputs of two linear layers.
            InputError: no data, or outputs that are not finite.
        """
        if not unit.batches:
            raise InputError("ranges of queries and keys need data", next="give calibration data")
        found = multiplied(unit.model, unit.batches[0])
        paths = [path for path in found if matches(path, self.targets)]
        if not paths:
            raise UsageError(
                "8-bit queries and keys",
                got=f"a network with the interface {unit.model.interface}",
                allowed="attentions whose queries and keys are linear layers' own outputs"
                + (f", such as {found[0]}" if found else ""),
                next="leave --attention out",
            )
        for path, sizes in _sizes(unit.model, paths, unit.batches).items():
            # A symmetric grid of 8 bits is one of 7 for what the values are without their sign.
            high = lookup("observers", self.observer, "fit")(sizes, 7)[1]
            yield Edit("output", path, ActivationRange(high / 127 or 1.0, 128), "8-bit output")


def multiplied(model: Model, batch: Batch) -> list[str]:
    """Linear layers whose outputs are multiplied with another one's, in the order they run."""
    few = {name: value[:1] for name, value in batch.items()}
    # By place in memory; held, so that no place is another's.
    outputs: dict[int, tuple[str, Tensor]] = {}
    found: dict[str, None] = {}

    class Products(TorchFunctionMode):
        def __torch_function__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            if func in _PRODUCTS and len(args) > 1:
                pair = [outputs.get(_place(x)) for x in args[:2]]
                if pair[0] and pair[1] and pair[0][0] != pair[1][0]:
                    for (path, whole), part in zip(pair, args, strict=False):  # type: ignore[misc]
                        if whole.numel() == part.numel():
                            found[path] = None
            return func(*args, **(kwargs or {}))

    def note(_: nn.Module, args: Any, output: Tensor, path: str) -> None:
        outputs[_place(output)] = path, output

    with ExitStack() as stack:
        for path, layer in _linears(model).items():
            stack.callback(_hook(layer, note, path).remove)
        with torch.no_grad(), Products():
            model.run(few)
    return list(found)


def _sizes(model: Model, paths: list[str], batches: Any) -> dict[str, Histogram]:
    """Absolute values of layers' outputs, padding left out."""
    found = {path: Histogram() for path in paths}
    mask: list[Tensor | None] = []
    layers = _linears(model)

    def note(_: nn.Module, args: Any, output: Tensor, path: str) -> None:
        if not bool(torch.isfinite(output).all()):
            raise InputError(
                f"outputs of {path} are NaN or infinite", next="check the model and the data"
            )
        found[path].add(unpadded(output, mask[-1]).abs())

    with ExitStack() as stack:
        for path in paths:
            stack.callback(_hook(layers[path], note, path).remove)
        with torch.no_grad():
            for batch in batches:
                mask.append(batch.get("attention_mask"))
                model.run(batch)
    return found


def _linears(model: Model) -> dict[str, nn.Module]:
    return {path: m for path, m in model.module.named_modules() if isinstance(m, nn.Linear)}


def _hook(layer: nn.Module, note: Any, path: str) -> Any:
    return layer.register_forward_hook(lambda m, args, output: note(m, args, output, path))


def _place(x: Any) -> int:
    return x.untyped_storage().data_ptr() if isinstance(x, Tensor) else 0
