"""The device that a fit is for: a recorded profile of it, or itself, reached over SSH.

With a profile the latency of a network on the device follows from the one measured here:

    t(device) = P(device) + (t(here) - P(here)) * F(device) / F(here)

    P   time of the products of its layers, each by its shape and format from the kernel table
    F   the same with every layer in float32

so what is no product is taken to be as much slower as float32 products are. A shape that is not
in a table has the rate (products a second) of its neighbours, by the inverse square of their
distance in the logarithms of the sizes. Tables of both machines have the same shapes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

from torch import Tensor

from penjing.fit.kit import record
from penjing.graph import is_weighted
from penjing.measure import Measured
from penjing.meter import metered, sized_batch
from penjing.model import Model
from penjing.profiles import Product, Profile, parse, read
from penjing.result import Latency

__all__ = ["Device", "products"]

_SECONDS = 15.0  # of timing this machine's kernels


def products(model: Model, *, batch: int, length: int) -> list[Product]:
    """The layers of one call; tables that are looked up are none."""
    meter = metered(model, sized_batch(model, batch=batch, length=length))
    found = []
    for path, layer in model.module.named_modules():
        if not is_weighted(layer) or not (macs := meter.macs.get(path, 0)):
            continue
        weight = cast(Tensor, layer.weight)
        outputs, inputs = len(weight), weight[0].numel()
        form = _format(model, path, weight)
        found.append(Product(form, macs / (inputs * outputs), inputs, outputs))
    return found


def _format(model: Model, path: str, weight: Tensor) -> str:
    if path in model.activations:
        return "int8"
    own = next(
        (p for n, p in model.planes.items() if model.module.get_parameter(n) is weight), None
    )
    if own is None:
        return "fp32"
    return "w4" if max(own.bits) <= 4 else "w8"


@dataclass
class Device:
    """Latencies of a device by its profile and what was measured here.

    Args:
        name: of the profile, for notes.
        profile: of the device.
        threads: there.
        here: a profile of this machine with the same shapes.
        threads_here: that latencies here are measured with.

    Raises:
        UsageError: the profile was not recorded with so many threads.
    """

    name: str
    profile: Profile
    threads: int
    here: Profile
    threads_here: int

    @staticmethod
    def load(path: Path, *, threads: int | None, threads_here: int) -> Device:
        """Read a profile and record one of this machine for the same shapes.

        Raises:
            InputError: it is no profile.
            UsageError: it was not recorded with so many threads.
        """
        found = read(path, threads)
        shapes = {shape for own in found.rates.values() for shape in own}
        here = record(
            threads=(threads_here,), seconds=_SECONDS,
            shapes=sorted({s[1:] for s in shapes}), tokens=sorted({s[0] for s in shapes}),
        )  # fmt: skip
        return Device(path.name, found, threads or found.threads[-1], parse(here), threads_here)

    def describe(self) -> str:
        """A clause for the notes."""
        return (
            f"latencies are those of {self.profile.processor} with {self.threads} "
            f"thread{'s' * (self.threads > 1)}, predicted from its profile {self.name} and from "
            "what was measured here; they are not measured there"
        )

    def there(self, model: Model, measured: Measured, *, batch: int, length: int) -> Measured:
        """What was measured here, with the latencies of the device."""
        layers = products(model, batch=batch, length=length)
        plain = [replace(layer, format="fp32") for layer in layers]
        slower = self._ratio(plain)
        own, there = self.here.seconds(layers, self.threads_here), self._there(layers)

        def moved(milliseconds: float) -> float:
            return 1e3 * there + max(0.0, milliseconds - 1e3 * own) * slower

        was = measured.measurement.latency_ms
        latency = Latency(moved(was.median), moved(was.p95), was.batch, was.length)
        return replace(
            measured,
            measurement=replace(measured.measurement, latency_ms=latency),
            rounds_ms=tuple(moved(ms) for ms in measured.rounds_ms),
        )

    def _there(self, layers: Sequence[Product]) -> float:
        return self.profile.seconds(layers, self.threads)

    def _ratio(self, plain: Sequence[Product]) -> float:
        here = self.here.seconds(plain, self.threads_here)
        return self._there(plain) / here if here else 1.0
