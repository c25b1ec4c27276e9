"""How many units must go for a share of the measured latency to go.

Latency is measured in onnxruntime: a network with fewer units, any of them, is exported and timed
in turn with the whole network's own export (`penjing.measure`), and what counts is the median over
rounds of their ratio. Between two measured networks latency is taken as linear in MACs, which says
which one to measure next (regula falsi), eight at the most. Without repair, for weights have no
part in it.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from penjing.errors import InputError
from penjing.export import export
from penjing.files import whole_file
from penjing.measure import Candidate, measure_files, median_ratio
from penjing.model import Batch, Model
from penjing.progress import task
from penjing.recipe import Recipe
from penjing.registry import lookup
from penjing.steps._ladder import Ladder
from penjing.steps._ranking import ladder_of
from penjing.steps.shrink import Shrink

__all__ = ["Sized", "for_latency"]

_MOST = 8
# Below what was asked for by less than this is near enough; timing is not finer.
_NEAR = 0.02
# Calls of each file at the most: of a fast network as many as there is time for.
_RUNS = 1000
_RUNTIME, _WRITER = "onnxruntime", "onnx"


@dataclass(frozen=True)
class Sized:
    """What was found.

    Attributes:
        kept: units that stay, by group.
        latency: of the whole network's, as measured.
        macs: likewise.
        measured: networks that were measured.
        threads: of onnxruntime.
    """

    kept: Mapping[str, int]
    latency: float
    macs: float
    measured: int
    threads: int

    def describe(self) -> str:
        """One line for people."""
        return (
            f"left: latency {self.latency:.1%} and MACs {self.macs:.1%} of the whole network's, by "
            f"{self.measured} networks measured in {_RUNTIME} (batch 1, threads {self.threads})"
        )


def for_latency(
    model: Model, step: Shrink, share: float, batches: Sequence[Batch] = (), *,
    length: int = 128, threads: int | None = None, seconds: float = 6.0,
    folder: Path | None = None,
) -> tuple[Shrink, Sized]:  # fmt: skip
    """The step with the units that stay, and what was measured.

    Args:
        step: whose other options hold.
        share: of the latency that goes, 0 to 1.
        batches: calibration data, for a ranking that wants some.
        length: tokens of a text; of a decoder those in its cache.
        threads: None for as many as torch has.
        seconds: about how long one network is timed.
        folder: where what was found is kept, for the same call to find it again.

    Raises:
        InputError: more than there is to take.
        ExportError: a network that cannot be exported.
    """
    step = replace(step, of="macs")
    cores = threads or torch.get_num_threads()
    asked = f"{Recipe((step,)).to_toml()}{model.source.fingerprint} {share} {length} {cores}"
    sized = _known(folder, asked)
    if sized is None:
        ladder = ladder_of(model, step, batches)
        with (
            task("measure latency"),
            tempfile.TemporaryDirectory(prefix="penjing.") as place,
        ):
            bench = _Bench(model, Path(place), length, cores, seconds)
            sized = _search(ladder, bench, 1 - share)
        if folder is not None:
            text = json.dumps({"asked": asked, "found": asdict(sized)})
            folder.mkdir(parents=True, exist_ok=True)
            whole_file(folder / _FOUND, lambda path: path.write_text(text), overwrite=True)
    return replace(step, of="units", ranking="layer", kept=sized.kept), sized


_FOUND = "latency.json"


def _known(folder: Path | None, asked: str) -> Sized | None:
    try:
        table = json.loads((folder / _FOUND).read_text()) if folder is not None else {}
        return Sized(**table["found"]) if table["asked"] == asked else None
    except (OSError, ValueError, TypeError, KeyError):  # none, or of another version
        return None


class _Bench:
    """Times networks against the whole one."""

    def __init__(self, model: Model, place: Path, length: int, threads: int, seconds: float):
        self.model, self.place = model, place
        self.length, self.threads, self.seconds = length, threads, seconds
        self.measured = 0
        self._whole = self._export(model)

    def _export(self, model: Model) -> Candidate:
        folder = Path(tempfile.mkdtemp(dir=self.place))
        export(model, folder, (_WRITER,))
        file = folder / str(lookup("runtimes", _RUNTIME, "file"))
        return Candidate(file, _RUNTIME, model.parameter_count)

    def latency(self, model: Model) -> float:
        """Of the whole network's."""
        self.measured += 1
        files = [self._whole, self._export(model)]
        was, now = measure_files(
            files, self.model, length=self.length, threads=self.threads, runs=_RUNS,
            seconds=self.seconds,
        )  # fmt: skip
        return 1 / median_ratio(was, now)


def _search(ladder: Ladder, bench: _Bench, target: float) -> Sized:
    """The largest measured network within the target.

    Kernels take channels in blocks: latency falls in steps, and what is next to the target may be
    well below it.
    """
    least = ladder.forms.share(ladder.rungs(ladder.length), "macs")
    slow, fast = (1.0, 1.0), (0.0, 0.0)  # MACs and latency, of the whole network's
    best: Sized | None = None
    fastest = 1.0, 1.0  # latency, and the MACs that go with it
    tried: set[int] = set()
    while len(tried) < _MOST:
        aim = max(target - _NEAR / 2, 0.0)
        part = (aim - fast[1]) / max(slow[1] - fast[1], 1e-9)
        guess = fast[0] + min(max(part, 0.0), 1.0) * (slow[0] - fast[0])
        rung = ladder.first("macs", guess) if guess > least else ladder.length
        if rung in tried:
            break
        tried.add(rung)
        kept = ladder.rungs(rung)
        form = ladder.forms.form(kept)
        macs, latency = ladder.forms.share(kept, "macs"), bench.latency(form)
        fastest = min(fastest, (latency, macs))
        if latency <= target:
            fast = macs, latency
            best = Sized(dict(kept), latency, macs, bench.measured, bench.threads)
            if latency >= target - _NEAR:
                break
        elif rung == ladder.length:
            break
        else:
            slow = macs, latency
    if best is None:
        raise InputError(
            f"shrink cannot take {1 - target:.0%} of the latency",
            got=f"at most {1 - fastest[0]:.0%}, with MACs {fastest[1]:.0%} of the whole network's",
            next="ask for less, or quantize or cut what is left",
        )  # fmt: skip
    return replace(best, measured=bench.measured)
