"""Shares of the latency, on files that onnxruntime really runs."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent))
import networks as net
from penjing import api, given, sizing
from penjing.apply import apply
from penjing.errors import InputError
from penjing.export import export
from penjing.inspect import inspect
from penjing.measure import Candidate, measure_files, median_ratio
from penjing.model import Model
from penjing.recipe import Recipe
from penjing.sizing import Sized, for_latency
from penjing.steps.shrink import Shrink


class Wide(nn.Module):
    """Convolutions that take nearly all of the time."""

    def __init__(self, width: int, size: int) -> None:
        super().__init__()
        widths = [3, width, width, width]
        pairs = itertools.pairwise(widths)
        self.convs = nn.ModuleList(nn.Conv2d(a, b, 3, 1, 1) for a, b in pairs)
        self.fc, self.size = nn.Linear(width, 4), size

    def forward(self, x: Tensor) -> Tensor:
        for conv in self.convs:
            x = torch.relu(conv(x))
        return self.fc(x.mean((2, 3)))


def wide(width: int = 96, size: int = 24) -> Model:
    torch.manual_seed(0)
    return net.wrap(Wide(width, size), "tensor", {"x": torch.randn(2, 3, size, size)})


def macs(model: Model) -> float:
    return float(inspect(model, latency=False).totals.macs or 0)


def test_the_latency_asked_for_is_that_of_the_file(tmp_path: Path) -> None:
    model, cores = wide(), torch.get_num_threads()
    step, sized = for_latency(
        model, Shrink(), 0.5, threads=cores, seconds=1.0, folder=tmp_path / "journal"
    )
    assert sized.latency <= 0.5
    assert 1 <= sized.measured <= 8
    small = apply(model, Recipe((step,)), [model.example]).model
    assert macs(small) / macs(model) == pytest.approx(sized.macs)
    half = apply(model, Recipe((Shrink(0.5),)), [model.example]).model
    files = []
    for name, one in (("whole", model), ("small", small), ("half", half)):
        (tmp_path / name).mkdir()
        export(one, tmp_path / name)
        files.append(Candidate(tmp_path / name / "model.onnx", "onnxruntime", one.parameter_count))
    was, now, least = measure_files(files, model, threads=cores, seconds=2)
    # A quarter of the MACs are faster still than half of the latency, and that than the whole.
    assert median_ratio(was, now) > 1.4
    assert macs(half) < macs(small)
    assert median_ratio(now, least) > 1.1
    # The same question has the same answer, without a clock.
    again = for_latency(
        model, Shrink(), 0.5, threads=cores, seconds=1.0, folder=tmp_path / "journal"
    )
    assert again == (step, sized)

    # So has the verb, in a journal that a killed run left.
    np.savez(tmp_path / "data.npz", x=model.example["x"].numpy())
    told: list[str] = []
    done = api.shrink(
        model, 0.5, data=tmp_path / "data.npz", of="latency", journal=tmp_path / "journal",
        tell=told.append,
    )  # fmt: skip
    assert told == [sized.describe()]
    assert net.same(done, small)
    assert done.recipe is not None
    assert done.recipe.steps[0].kept == sized.kept


def test_what_other_layers_take_cannot_go() -> None:
    with pytest.raises(InputError, match=r"cannot take 98% of the latency; got at most .*MACs"):
        for_latency(wide(8, 8), Shrink(), 0.98, threads=1, seconds=0.2)


def test_the_most_that_can_go_is_of_the_fastest_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Timing is noisy: the smallest network need not be the fastest that was measured."""

    class Bench:
        measured, threads = 0, 1

        def __init__(self, *_: object) -> None:
            self._times = iter((0.6, 0.4, 0.45))

        def latency(self, _: Model) -> float:
            self.measured += 1
            return next(self._times, 0.45)

    monkeypatch.setattr(sizing, "_Bench", Bench)
    with pytest.raises(InputError, match=r"cannot take 70% of the latency; got at most 60%, with"):
        for_latency(wide(16, 8), Shrink(), 0.7, threads=1)


def test_data_are_encoded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = wide(16, 8)
    np.savez(tmp_path / "data.npz", x=model.example["x"].numpy())
    ranked, encoded = [], []

    def fixed(_: Model, step: Shrink, share: float, batches: object, **__: object) -> object:
        ranked.append(batches)
        kept = {"convs.0.weight": 8}
        return Shrink(kept=kept), Sized(kept, 1 - share, 0.5, 1, 1)

    monkeypatch.setattr(api, "for_latency", fixed)
    encode = given.encode
    monkeypatch.setattr(given, "encode", lambda *a, **o: encoded.append(1) or encode(*a, **o))
    done = api.shrink(
        model, 0.5, data=tmp_path / "data.npz", of="latency", ranking="global", criterion="l2"
    )
    assert done.module.convs[0].out_channels == 8
    assert len(encoded) == 1
    assert ranked[0]
