"""results.json: what a run asked, did and measured; its names are fixed, programs read them."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

__all__ = ["Drop", "Latency", "Measurement", "Point", "Result", "Unit", "show_drop"]

FORMAT = 1


# Metrics that are no share of anything.
_PLAIN = ("spearman", "pearson", "correlation", "cosine", "loss", "similarity")


def show_drop(value: float, metric: str, relative: bool = False) -> str:
    """A drop of `metric` for people: percent, nats of KL, or the plain number."""
    name = metric.lower()
    if relative:
        return f"{value:.2%}"
    if name == "kl":
        return f"{value:.4f} nats"
    return f"{value:.4f}" if any(word in name for word in _PLAIN) else f"{value:.2%}"


@dataclass(frozen=True)
class Latency:
    """Milliseconds of one call, at a batch size and input length (None for images)."""

    median: float
    p95: float
    batch: int
    length: int | None


@dataclass(frozen=True)
class Measurement:
    """One exported file, measured by running it.

    Attributes:
        size_bytes: bytes of the exported model on disk, all its files.
        parameters: weights of the network.
        stored_bits_per_weight: 8 * size_bytes / parameters, all metadata counted.
        latency_ms: batch 1, or what the user asked for.
        peak_memory_bytes: peak resident memory of the process that ran it.
        quality: the task's metric through that file, None where no data was given.
        throughput_per_second: samples a second at the user's batch, where asked for.
        latency_batch_ms: latency at the user's batch, where asked for.
    """

    size_bytes: int
    parameters: int
    stored_bits_per_weight: float
    latency_ms: Latency
    peak_memory_bytes: int
    quality: float | None = None
    throughput_per_second: float | None = None
    latency_batch_ms: Latency | None = None


@dataclass(frozen=True)
class Drop:
    """Loss of quality from before to after, positive is worse, with its confidence interval.

    Attributes:
        value, low, high: of the drop; a fraction of the original's metric when `relative`.
        confidence: of the interval, e.g. 0.95.
        samples: evaluation samples.
        relative: whether the drop is divided by the original's metric.
    """

    value: float
    low: float
    high: float
    confidence: float
    samples: int
    relative: bool

    @property
    def unseen(self) -> float | None:
        """Largest share of all samples that may change where none of these did, else None.

        No resample differs then, and the interval says nothing. Of n samples without a change
        at most 1 - (1 - confidence)^(1/n) of all change: the exact binomial bound.
        """
        if not self.samples or not self.low == self.high == self.value == 0:
            return None
        return float(1 - (1 - self.confidence) ** (1 / self.samples))


@dataclass(frozen=True)
class Point:
    """One candidate of the front; `recipe` is TOML.

    `predicted` is what was expected of it before it was made: `size_bytes`, `latency_ms`, `drop`.
    """

    size_bytes: float
    latency_ms: float
    quality: float | None
    recipe: str
    measured: bool
    name: str = ""
    predicted: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Unit:
    """What was done to one part of the network, and why."""

    name: str
    decision: str
    why: str


@dataclass(frozen=True)
class Result:
    """One run; `to_json` gives results.json, whose names docs/artifact.md explains.

    `device` is None where latencies are of the machine that ran it: else `name`, `threads` and
    whether they were `measured` there; if not, they are predicted from its profile.
    """

    task: str
    metric: str
    runtime: str
    threads: int
    before: Measurement
    after: Measurement
    drop: Drop | None
    budget: dict[str, Any]
    met: bool
    why: str | None
    front: tuple[Point, ...] = ()
    units: tuple[Unit, ...] = ()
    notes: tuple[str, ...] = ()
    seed: int = 0
    versions: dict[str, str] = field(default_factory=dict)
    higher_is_better: bool = True
    sensitivity: dict[str, dict[str, float]] = field(default_factory=dict)
    bounds: tuple[str, ...] = ()
    device: dict[str, Any] | None = None

    @property
    def limited(self) -> bool:
        """Whether a limit was asked for, other than the time of the work."""
        return any(name != "within" and value is not None for name, value in self.budget.items())

    def to_json(self) -> dict[str, Any]:
        """The dictionary that results.json holds."""
        return {"format": FORMAT} | asdict(self)

    @staticmethod
    def from_json(table: dict[str, Any]) -> Result:
        """Inverse of `to_json`."""
        fields = {k: v for k, v in table.items() if k != "format"}
        for side in ("before", "after"):
            fields[side] = _measurement(fields[side])
        fields["drop"] = Drop(**fields["drop"]) if fields["drop"] else None
        fields["front"] = tuple(Point(**p) for p in fields["front"])
        fields["units"] = tuple(Unit(**u) for u in fields["units"])
        for name in ("notes", "bounds"):
            fields[name] = tuple(fields.get(name, ()))
        return Result(**fields)


def _measurement(table: dict[str, Any]) -> Measurement:
    fields = dict(table)
    for name in ("latency_ms", "latency_batch_ms"):
        fields[name] = Latency(**fields[name]) if fields[name] else None
    return Measurement(**fields)
