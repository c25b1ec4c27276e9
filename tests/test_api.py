"""Every verb's arguments; what each gives, on a tiny network of a file of one's own."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import penjing
from penjing import api
from penjing.errors import ExportError, InputError, PenjingError, UsageError
from penjing.model import Model

NET = """
import torch
from torch import nn

class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.act, self.down = nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16)

    def forward(self, x):
        return x + self.down(self.act(self.up(x)))

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.Sequential(*(Block() for _ in range(4)))
        self.head = nn.Linear(16, 3)

    def forward(self, x):
        return self.head(self.blocks(x)).mean(1)

def net():
    torch.manual_seed(0)
    return Net()

def example():
    return {"x": torch.zeros(2, 6, 16)}
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("api")
    (folder / "net.py").write_text(NET)
    random = np.random.default_rng(0)
    np.savez(
        folder / "data.npz",
        x=random.normal(size=(48, 6, 16)).astype(np.float32),
        label=np.arange(48) % 3,
    )
    return folder


@pytest.fixture(scope="module")
def model(place: Path) -> Model:
    return penjing.load(f"{place / 'net.py'}:net", weights="own")


@pytest.fixture(scope="module")
def data(place: Path) -> Path:
    return place / "data.npz"


@pytest.fixture(scope="module")
def artifact(place: Path, model: Model, data: Path) -> Path:
    folder = place / "small"
    penjing.save(penjing.quantize(model, 8, data=data), folder, to=["onnx"])
    return folder


def weights(model: Model) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in model.parameters()}


@pytest.mark.parametrize(
    ("call", "error", "parts"),
    [
        (lambda m, d: api.prune(m, 1.0), UsageError, ["sparsity", "got 1.0", "allowed"]),
        (lambda m, d: api.prune(m, 0.5, criterion="wanda"), UsageError,
         ["criterion wanda needs data", "next: give --data, or use magnitude"]),
        (lambda m, d: api.prune(m, 0.5, criterion="no"), UsageError,
         ["got 'no'", "magnitude, random"]),
        (lambda m, d: api.prune(m, pattern="2:x"), UsageError, ["2:x"]),
        (lambda m, d: api.shrink(replace(m, interface="weights"), 0.5, data=d), UsageError,
         ["shrink is for networks", "bare weights"]),
        (lambda m, d: api.shrink(m, 0.5), UsageError, ["shrink needs data", "next: give --data"]),
        (lambda m, d: api.shrink(m, 1.5, data=d), UsageError, ["ratio", "got 1.5", "allowed"]),
        (lambda m, d: api.shrink(m, 0.5, data=d, of="watts"), UsageError,
         ["of; got 'watts'", "allowed: units, parameters, macs, latency"]),
        (lambda m, d: api.cut(m, 1), UsageError, ["cut needs data"]),
        (lambda m, d: api.cut(m, data=d), UsageError, ["exactly one of layers, ratio"]),
        (lambda m, d: api.cut(m, 0, data=d), UsageError, ["layers", "got 0", "1 or more"]),
        (lambda m, d: api.cut(m, 4, data=d), InputError, ["too many", "got 4", "at most 3"]),
        (lambda m, d: api.cut(m, 2.5, data=d), UsageError, ["layers", "got 2.5"]),
        (lambda m, d: api.cut(m, 1, data=d, patch="magic"), UsageError,
         ["got magic", "linear, low-rank, fused, merged, none"]),
        (lambda m, d: api.quantize(m, 9), UsageError, ["bits", "got 9", "from 2 to 8"]),
        (lambda m, d: api.quantize(m, 4, activations=8), UsageError, ["8-bit activations"]),
        (lambda m, d: api.quantize(m, 8, activations=4), UsageError,
         ["activations", "got 4", "0 or 8"]),
        (lambda m, d: api.quantize(m, 8, method="no"), UsageError, ["got 'no'", "gptq"]),
        (lambda m, d: api.recover(m, d), UsageError, ["not edited", "next: edit it first"]),
        (lambda m, d: api.recover(api.prune(m, 0.5)), UsageError, ["recover needs data"]),
        (lambda m, d: api.recover(api.prune(m, 0.5), d, lr=2.0), UsageError, ["lr", "got 2.0"]),
        (lambda m, d: api.recover(api.prune(m, 0.5), d, seconds=-1), UsageError, ["recover"]),
        (lambda m, d: api.apply(m, "/no/recipe.toml"), InputError,
         ["no such recipe", "got /no/recipe.toml"]),
        (lambda m, d: api.cut(m, 1, data="/no/data.npz"), InputError,
         ["no such data file", "got /no/data.npz"]),
        (lambda m, d: api.evaluate(m, d, runtime="onnxruntime"), UsageError,
         ["evaluated from its artifact's path"]),
        (lambda m, d: api.evaluate(m, d, task="no"), UsageError,
         ["got 'no'", "classification"]),
        (lambda m, d: api.fit(m, d, "/no/folder/out", max_drop=0.1), InputError,
         ["does not exist", "got /no/folder"]),
        (lambda m, d: api.fit(m, d, "out", max_drop=-0.1), UsageError,
         ["--max-drop", "got -0.1", "0 or more"]),
        (lambda m, d: api.fit(m, d, "out", max_size="25MB"), UsageError,
         ["--max-size", "got '25MB'", "a number"]),
        (lambda m, d: api.load("/no/model"), InputError, ["no such file or folder"]),
    ],
)  # fmt: skip
def test_what_is_refused(
    call: Callable[[Model, Path], Any], error: type[PenjingError], parts: list[str],
    model: Model, data: Path,
) -> None:  # fmt: skip
    before = weights(model)
    with pytest.raises(error) as caught:
        call(model, data)
    assert type(caught.value) is error
    for part in parts:
        assert part in str(caught.value)
    assert all(torch.equal(before[n], p) for n, p in model.parameters())


def test_prune(model: Model, data: Path) -> None:
    before = weights(model)
    blind, seeing = penjing.prune(model, 0.25), penjing.prune(model, pattern="2:4", data=data)
    for name, mask in blind.masks.items():
        assert float((~mask).float().mean()) == pytest.approx(0.25, abs=0.01)
        # Without data the smallest go.
        gone, kept = before[name][~mask].abs(), before[name][mask].abs()
        assert gone.max() <= kept.max()
    for mask in seeing.masks.values():
        assert (mask.reshape(-1, 4).sum(1) == 2).all()
    assert blind.masks.keys() == seeing.masks.keys()
    assert len(blind.masks) >= 8
    assert not model.masks


def test_shrink_and_cut_by_ratio(model: Model, data: Path) -> None:
    small = penjing.shrink(model, 0.5, data=data)
    assert [b.up.out_features for b in small.module.blocks] == [16] * 4
    assert [len(penjing.cut(model, x, data=data).blocks) for x in (0.5, 1, 3, 0.25)] == [2, 3, 1, 3]
    assert len(penjing.cut(model, ratio=0.5, data=data).blocks) == 2
    assert len(model.blocks) == 4


def test_patches_alone_are_trained(model: Model, tmp_path: Path) -> None:
    """On what they are trained toward: the outputs of the whole network."""
    data = tmp_path / "data.npz"
    np.savez(data, x=np.random.default_rng(1).normal(size=(512, 6, 16)).astype(np.float32))
    cut, trained = (penjing.cut(model, 2, data=data, train=steps) for steps in (0, 40))
    changed = {n for n, w in weights(trained).items() if not torch.equal(w, weights(cut)[n])}
    assert changed
    assert all("penjing_" in name for name in changed)
    batch = {"x": torch.from_numpy(np.load(data)["x"])}
    with torch.no_grad():
        off = [float((m.run(batch) - model.run(batch)).norm()) for m in (cut, trained)]
    assert off[1] < off[0]
    for wrong in ({"patch": "none"}, {"patch": "fused"}, {"part": "mlp"}):
        with pytest.raises(UsageError, match="train, of patches"):
            penjing.cut(model, 1, data=data, train=5, **wrong)
    with pytest.raises(UsageError, match="train with learn"):
        penjing.cut(model, 1, data=data, train=5, learn="gates")


def pairs(model: Model) -> int:
    """The largest sum of two neighbouring codes about the zero point."""
    codes = [p.codes[0].int() - 128 for p in model.planes.values() if p.bits == (8,)]
    return max(int((c[:, ::2] + c[:, 1::2]).abs().max()) for c in codes)


@pytest.mark.parametrize("bits", [7, 8])
def test_quantized_inputs_without_data_have_ranges_at_run_time(
    model: Model, data: Path, monkeypatch: pytest.MonkeyPatch, bits: int
) -> None:
    """And weights whose products the processor adds exactly."""
    monkeypatch.setattr(api, "weight_bits", lambda: bits)
    dynamic = penjing.quantize(model, 8, activations=8)
    static = penjing.quantize(model, 8, activations=8, data=data)
    assert dynamic.activations.keys() == static.activations.keys()
    assert len(dynamic.activations) == 9
    assert all(r.scale == 0 for r in dynamic.activations.values())
    assert all(r.scale > 0 for r in static.activations.values())
    for made in (dynamic, static):
        assert all(p.bits == (8,) for p in made.planes.values())
        assert (pairs(made) <= 128) == (bits == 7)
    # A method that knows nothing of pairs.
    blind = penjing.quantize(model, 8, activations=8, method="clip")
    assert all(p.bits == (bits,) for p in blind.planes.values())


def test_an_observer_may_cut_the_ranges(model: Model, data: Path) -> None:
    whole, cut = (
        penjing.quantize(model, 8, activations=8, data=data, observer=name).activations
        for name in ("minmax", "mse")
    )
    assert set(cut) == set(whole)
    assert all(cut[name].scale <= whole[name].scale for name in whole)
    assert any(cut[name].scale < whole[name].scale for name in whole)


def test_the_first_layers_stay_in_floats(model: Model, data: Path) -> None:
    half = penjing.quantize(model, 8, activations=8, data=data, floats=0.5)
    left = [n for n, _ in model.module.named_modules() if n.endswith((".up", ".down", "head"))]
    names = {f"{n}.weight" for n in left} - set(half.planes)
    assert 0 < len(names) <= 5
    assert "blocks.0.up.weight" in names
    with pytest.raises(UsageError, match="in floats needs data"):
        penjing.quantize(model, 8, activations=8, floats=0.5)


def test_bits_by_layer_say_how_many_samples_they_need(model: Model, data: Path) -> None:
    with pytest.raises(InputError, match=r"got one batch, of 8 samples.*at least 9 samples"):
        penjing.quantize(model, 4, mixed=True, data=data, samples=8)
    assert penjing.quantize(model, 4, mixed=True, data=data, samples=9).planes


def test_the_method_follows_the_data(model: Model, data: Path) -> None:
    plain, same = penjing.quantize(model, 4), penjing.quantize(model, 4, method="rtn", data=data)
    better = penjing.quantize(model, 4, data=data)
    name = "blocks.0.down.weight"
    assert torch.equal(plain.planes[name].codes, same.planes[name].codes)
    assert not torch.equal(plain.planes[name].codes, better.planes[name].codes)


def test_recover_trains_what_was_edited(model: Model, data: Path) -> None:
    cut = penjing.cut(model, 2, data=data, patch="none")
    better = penjing.recover(cut, data, seconds=2.0, lr=3e-3, loss="mse")
    x = torch.from_numpy(np.load(data)["x"])
    with torch.no_grad():
        goal, was, now = (m.module(x) for m in (model, cut, better))
    assert (now - goal).norm() < (was - goal).norm()


def test_apply_replays_a_recipe(model: Model, data: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(
        'seed = 3\n[[step]]\ndo = "cut"\nlayers = 1\n[[step]]\ndo = "quantize"\nbits = 4\n'
    )
    one, two = (penjing.apply(model, recipe, data) for _ in range(2))
    assert len(one.blocks) == 3
    assert {p.bits for p in one.planes.values()} == {(4,)}
    again = weights(two)
    assert all(torch.equal(value, again[name]) for name, value in weights(one).items())
    by_hand = penjing.quantize(penjing.cut(model, 1, data=data), 4, data=data)
    for name, planes in by_hand.planes.items():
        assert torch.equal(planes.codes, one.planes[name].codes)
    for text, words in (("x = [", "not TOML"), ('[[step]]\ndo = "fly"\n', "unknown step"),
                        ('[[step]]\ndo = "cut"\nwings = 2\n', "no option wings")):  # fmt: skip
        recipe.write_text(text)
        with pytest.raises(InputError, match=words):
            penjing.apply(model, recipe, data)


def test_an_artifact_is_measured_evaluated_and_exported(artifact: Path, data: Path) -> None:
    measured = penjing.measure(artifact, data=data, task="classification", threads=1)
    assert measured["size_bytes"] == (artifact / "model.onnx").stat().st_size
    assert measured["runtime"] == "onnxruntime"
    assert measured["latency_ms"]["median"] > 0
    assert measured["peak_memory_bytes"] > 1_000_000
    assert measured["samples"] == 48
    exported = penjing.evaluate(artifact, data, task="classification", runtime="onnxruntime")
    assert exported["value"] == measured["quality"]
    assert exported["runtime"] == "onnxruntime"
    plain = penjing.evaluate(artifact, data, task="classification")
    assert plain["runtime"] == "torch"
    # By hand: the share of the 48 samples with the right class.
    module = penjing.load(artifact).module
    with np.load(data) as arrays, torch.no_grad():
        right = module(torch.from_numpy(arrays["x"])).argmax(1).numpy() == arrays["label"]
    assert plain["value"] == pytest.approx(right.mean())
    assert abs(exported["value"] - plain["value"]) <= 3 / 48


def test_an_artifact_without_the_export(artifact: Path, model: Model, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no export for this runtime.*allowed: onnxruntime"):
        penjing.measure(artifact, runtime="openvino")
    for runtime in ("openvino", "executorch"):
        with pytest.raises(InputError, match=f"penjing export .* --to {runtime}, or"):
            penjing.measure(artifact, runtime=runtime)
    penjing.save(penjing.prune(model, 0.5), tmp_path / "bare")
    with pytest.raises(InputError, match=r"nothing is exported.*penjing export"):
        penjing.measure(tmp_path / "bare")
    found = penjing.export(tmp_path / "bare", ["onnx"])
    assert set(found) == {"onnx"}
    assert found["onnx"] < 1e-4
    assert penjing.measure(tmp_path / "bare", threads=1)["runtime"] == "onnxruntime"
    assert all(check.ok for check in penjing.verify(tmp_path / "bare"))


def test_a_failed_export_leaves_the_artifact(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    penjing.save(penjing.prune(model, 0.5), tmp_path / "a")
    before = {p.name: p.read_bytes() for p in (tmp_path / "a").iterdir() if p.is_file()}

    def export(*_: Any) -> dict[str, float]:
        raise ExportError("the onnx file does not agree with the model")

    monkeypatch.setattr(api, "_export", export)
    with pytest.raises(ExportError):
        penjing.export(tmp_path / "a", ["onnx"])
    assert {p.name: p.read_bytes() for p in (tmp_path / "a").iterdir() if p.is_file()} == before
    assert [p.name for p in tmp_path.iterdir()] == ["a"]
    monkeypatch.undo()
    with pytest.raises(UsageError, match="unknown export target"):
        penjing.export(tmp_path / "a", ["pickle"])


def test_save_refuses_what_is_there(model: Model, tmp_path: Path) -> None:
    (tmp_path / "note").write_text("mine")
    with pytest.raises(InputError, match="exists"):
        penjing.save(model, tmp_path)
    assert (tmp_path / "note").read_text() == "mine"


def test_no_verb_is_imported_before_it_is_used() -> None:
    code = (
        "import sys, json, penjing\n"
        "early = [m for m in ('torch', 'transformers', 'penjing.api') if m in sys.modules]\n"
        "print(json.dumps([early, callable(penjing.fit), 'torch' in sys.modules]))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120
    )
    assert json.loads(done.stdout) == [[], True, True]


def test_every_verb_is_there_and_documented() -> None:
    for name in api.__all__:
        if name == "STEPS":
            continue
        verb = getattr(penjing, name)
        assert callable(verb), name
        assert verb.__doc__, name
    with pytest.raises(AttributeError, match="no attribute 'fly'"):
        penjing.fly  # noqa: B018


def test_packed_is_measured_without_an_export(model: Model, data: Path, tmp_path: Path) -> None:
    penjing.save(penjing.quantize(model, 2, codes="e8"), tmp_path / "out")
    found = penjing.measure(tmp_path / "out", runtime="packed", data=data, task="classification")
    assert found["runtime"] == "packed"
    assert found["latency_ms"]["median"] > 0
    with pytest.raises(InputError, match="or --runtime packed"):
        penjing.measure(tmp_path / "out")


def test_a_pruned_artifact_that_is_shrunk_stays_pruned(
    model: Model, data: Path, tmp_path: Path
) -> None:
    penjing.save(penjing.prune(model, 0.5), tmp_path / "pruned")
    small = penjing.shrink(tmp_path / "pruned", 0.5, data=data)
    penjing.save(small, tmp_path / "small", to=["onnx"])
    assert all(check.ok for check in penjing.verify(tmp_path / "small"))
    again = penjing.load(tmp_path / "small")
    assert again.masks.keys() == small.masks.keys() == penjing.prune(model, 0.5).masks.keys()
    for name, mask in again.masks.items():
        weight = again.module.get_parameter(name)
        assert min(weight.shape) == 16  # of 32
        assert torch.equal(mask, weight != 0)
        assert torch.equal(mask, small.masks[name])


def test_labels_that_are_the_networks_classes_lead_the_slopes(place: Path) -> None:
    """With labels the loss is their cross entropy, without them that of drawn ones."""
    model = api.load(f"{place}/net.py:net", weights="own")
    with np.load(place / "data.npz") as stored:
        x, label = stored["x"], stored["label"]
    files = {"with": {"x": x, "label": label}, "without": {"x": x}}
    masks = {}
    for name, arrays in files.items():
        np.savez(place / f"{name}.npz", **arrays)
        done = api.prune(model, 0.5, criterion="taylor", data=place / f"{name}.npz")
        masks[name] = done.masks["blocks.0.up.weight"]
    score = torch.zeros(32, 16)
    for sample, own in zip(torch.tensor(x), torch.tensor(label), strict=True):
        weight = model.module.blocks[0].up.weight
        loss = torch.nn.functional.cross_entropy(model.module(sample[None]), own[None])
        (g,) = torch.autograd.grad(loss, [weight])
        score += (g * weight).detach().abs()
    assert torch.equal(masks["with"].flatten(), score.flatten() > score.median())
    assert not torch.equal(masks["with"], masks["without"])


def test_labels_beyond_the_classes_are_refused(place: Path) -> None:
    model = api.load(f"{place}/net.py:net", weights="own")
    with np.load(place / "data.npz") as stored:
        x, label = stored["x"], stored["label"]
    np.savez(place / "beyond.npz", x=x, label=np.where(np.arange(len(label)) == 3, 99, label))
    for criterion in ("taylor", "fisher"):
        with pytest.raises(InputError, match=r"got label 99 on 1 samples.*allowed: 0 to.*or leave"):
            api.prune(model, 0.5, criterion=criterion, data=place / "beyond.npz")
    with pytest.raises(InputError, match="got label 99"):
        api.prune(model, 0.5, learn="gates", loss="labels", data=place / "beyond.npz", steps=1)
    for verb in (api.prune, api.shrink):  # the order that gates start from
        with pytest.raises(InputError, match="got label 99"):
            verb(model, 0.5, learn="gates", criterion="taylor", data=place / "beyond.npz", steps=1)
    # No criterion of the others looks at them.
    assert api.prune(model, 0.5, criterion="wanda", data=place / "beyond.npz").masks
