"""Whole fits of tiny networks: other kinds, failures on the way, and what is left behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    BertConfig,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

import penjing
from penjing.cli import group
from penjing.data import Dataset, read
from penjing.errors import BudgetError, ExportError, InputError, UsageError
from penjing.fit import Budget, Settings, bench, fit, loop
from penjing.fit.bench import Bench, Exported
from penjing.fit.loop import _slope
from penjing.fit.survey import Depth, Survey
from penjing.model import Model
from penjing.result import Result
from penjing.tasks import find

WORDS = [f"w{i}" for i in range(98)]
SETTINGS = {"runtime": "onnxruntime", "length": 16, "threads": 1, "recover": 0.0, "tries": 1}

CNN = """
import torch
from torch import nn

class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.act = nn.ReLU()

    def forward(self, x):
        return x + self.act(self.norm(self.conv(x)))

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.blocks = nn.Sequential(Block(), Block())
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        return self.head(self.blocks(self.stem(x)).mean((2, 3)))

def net():
    torch.manual_seed(0)
    model = Net()
    model.train()
    with torch.no_grad():
        for _ in range(5):  # norms with statistics of their own
            model(torch.randn(16, 3, 12, 12) * 2 + 1)
    return model.eval()

def example():
    return {"x": torch.zeros(2, 3, 12, 12)}
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """`bert`, `llama`, `net.py` with data for each; outputs go elsewhere."""
    folder = tmp_path_factory.mktemp("fits")
    vocabulary = {w: i for i, w in enumerate(["[PAD]", "[UNK]", *WORDS])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="[PAD]", unk_token="[UNK]", model_max_length=64
    )
    sizes = {
        "vocab_size": 100, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
        "intermediate_size": 64, "max_position_embeddings": 64,
    }  # fmt: skip
    torch.manual_seed(0)
    BertModel(BertConfig(**sizes)).save_pretrained(folder / "bert")
    LlamaForCausalLM(LlamaConfig(**sizes, num_key_value_heads=2)).save_pretrained(folder / "llama")
    for name in ("bert", "llama"):
        tokenizer.save_pretrained(folder / name)
    random = np.random.default_rng(0)
    rows = [
        {"text": " ".join(random.choice(WORDS[i % 2 :: 2], 12)), "label": f"topic {i % 2}"}
        for i in range(60)
    ]
    (folder / "data.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    (folder / "net.py").write_text(CNN)
    pictures = random.normal(1, 2, (48, 3, 12, 12)).astype(np.float32)
    np.savez(folder / "pictures.npz", x=pictures)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PENJING_CACHE", str(folder / "cache"))
        yield folder


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer calls timed, and no micro-benchmark: other tests look at figures."""
    real = bench.measure_files

    def measure(*arguments: Any, **options: Any) -> Any:
        return real(*arguments, **(options | {"runs": 5, "seconds": 1.0}))

    monkeypatch.setattr(bench, "measure_files", measure)
    monkeypatch.setattr(loop, "preflight", lambda *given: ([], given[2]))


def run(
    model: Path | Model, data: Path | Dataset, output: Path, budget: Budget, **options: Any
) -> Result:
    calibration = options.pop("calibration", None)
    loaded = model if isinstance(model, Model) else penjing.load(str(model))
    dataset = data if isinstance(data, Dataset) else read(data)
    task = find(options.pop("task", None), dataset, loaded)
    settings = Settings(**(SETTINGS | options))
    return fit(loaded, dataset, output, task, budget, settings, calibration=calibration)


def run_cnn(place: Path, output: Path, max_drop: float) -> Result:
    """The network that is exported fastest."""
    model = penjing.load(f"{place / 'net.py'}:net", weights="own")
    return run(model, place / "pictures.npz", output, Budget(max_drop=max_drop), task="fidelity")


def left_behind(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def test_a_decoder_by_its_perplexity(place: Path, tmp_path: Path) -> None:
    result = run(place / "llama", place / "data.jsonl", tmp_path / "out", Budget(max_drop=0.5))
    assert result.met
    assert result.task == "perplexity"
    assert not result.higher_is_better
    assert result.drop is not None
    assert result.drop.relative
    # Relative: how much larger the perplexity is, as a fraction of the original's.
    before, after = result.before.quality, result.after.quality
    assert result.drop.value == pytest.approx(after / before - 1, abs=1e-6)
    # A random network knows nothing: as perplexed as by equal chances, or a little more.
    assert 95 < before < 200
    assert all(check.ok for check in penjing.verify(tmp_path / "out"))
    assert left_behind(tmp_path) == ["out"]


def test_a_convolutional_network_by_its_fidelity(place: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = run_cnn(place, out, max_drop=0.2)
    assert result.met
    assert result.before.quality == pytest.approx(1.0, abs=1e-3) or result.before.quality < 1e-3
    assert result.after.size_bytes == (out / "model.onnx").stat().st_size
    assert all(check.ok for check in penjing.verify(out))
    # The loaded module is what the file computes.
    again = penjing.load(str(out))
    assert not any(isinstance(m, torch.nn.BatchNorm2d) for m in again.module.modules())
    import onnxruntime

    x = np.random.default_rng(1).normal(1, 2, (4, 3, 12, 12)).astype(np.float32)
    session = onnxruntime.InferenceSession(str(out / "model.onnx"))
    theirs = session.run(None, {session.get_inputs()[0].name: x})[0]
    with torch.no_grad():
        mine = again.run({"x": torch.from_numpy(x)}).numpy()
    assert np.linalg.norm(mine - theirs) < 0.05 * np.linalg.norm(theirs)


def test_out_of_reach_is_status_3_and_keeps_the_nearest(place: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = [
        "fit", place / "bert", "--data", place / "data.jsonl", "--max-size", "1KB", "--runtime",
        "onnxruntime", "--length", "16", "--within", "1s", "--json", "-o", out,
    ]  # fmt: skip
    done = CliRunner().invoke(group, [str(a) for a in arguments])
    assert done.exit_code == 3, done.stderr
    assert done.stderr.startswith("penjing: budget not met: size is ")
    assert "asked 1.0 KB" in done.stderr
    table = json.loads((out / "results.json").read_text())
    assert table["met"] is False
    assert table["why"].startswith("size is ")
    assert table["budget"] == {"max_size": 1000, "within": 1.0}
    assert (out / "model.onnx").stat().st_size == table["after"]["size_bytes"]
    # The nearest of what was measured is kept.
    sizes = [p["size_bytes"] for p in table["front"] if p["recipe"]]
    assert table["after"]["size_bytes"] == min(sizes)
    assert "<html" in (out / "report.html").read_text()
    assert left_behind(tmp_path) == ["out"]


def test_a_candidate_that_cannot_be_exported_is_a_note(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = bench.export

    def export(model: Model, folder: Path, to: Any) -> Any:
        if folder.name.startswith("candidate"):
            raise ExportError("no such operation", got="aten::strange")
        return real(model, folder, to)

    monkeypatch.setattr(bench, "export", export)
    out = tmp_path / "out"
    result = run_cnn(place, out, max_drop=0.5)
    assert any("aten::strange" in note for note in result.notes)
    # The plain low-bit version stands in.
    assert len(result.front) == 1
    assert result.after.size_bytes < result.before.size_bytes
    assert all(check.ok for check in penjing.verify(out))


def test_a_candidate_that_gives_nan_is_a_note(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Bench.evaluate

    def evaluate(self: Bench, exported: Exported, reference: Any) -> Any:
        if exported.name.startswith("candidate"):
            raise InputError("the model's output is not a number (NaN)")
        return real(self, exported, reference)

    monkeypatch.setattr(Bench, "evaluate", evaluate)
    out = tmp_path / "out"
    result = run_cnn(place, out, max_drop=0.5)
    assert any("(NaN)" in note and note.startswith("candidate 1") for note in result.notes)
    assert result.after.quality is not None
    assert left_behind(tmp_path) == ["out"]


def test_when_nothing_works_it_is_said_and_nothing_is_left(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = bench.export

    def export(model: Model, folder: Path, to: Any) -> Any:
        if not folder.name.startswith("original"):
            raise ExportError("no such operation", got="aten::strange")
        return real(model, folder, to)

    monkeypatch.setattr(bench, "export", export)
    with pytest.raises(BudgetError, match="aten::strange"):
        run_cnn(place, tmp_path / "out", max_drop=0.5)
    assert left_behind(tmp_path) == []
    monkeypatch.setattr(bench, "export", lambda *_: (_ for _ in ()).throw(ExportError("never")))
    with pytest.raises(InputError, match="no runtime takes this model"):
        run_cnn(place, tmp_path / "out", max_drop=0.5)
    assert left_behind(tmp_path) == []


def test_refusals_before_any_work(place: Path, tmp_path: Path) -> None:
    dataset = read(place / "data.jsonl")
    budget = Budget(max_drop=0.5)
    with pytest.raises(InputError, match="overlap"):
        run(place / "bert", dataset, tmp_path / "out", budget, calibration=dataset.subset([3]))
    with pytest.raises(InputError, match="too little data"):
        run(place / "bert", dataset.subset(range(7)), tmp_path / "out", budget)
    with pytest.raises(UsageError, match="fit measures exported files"):
        run(place / "bert", dataset, tmp_path / "out", budget, runtime="torch")
    with pytest.raises(UsageError, match="unknown name in runtimes"):
        run(place / "bert", dataset, tmp_path / "out", budget, runtime="nonsense")
    assert left_behind(tmp_path) == []
    (tmp_path / "out").mkdir()
    with pytest.raises(InputError, match="the output exists"):
        run(place / "bert", dataset, tmp_path / "out", budget)
    assert left_behind(tmp_path) == ["out"]
    assert left_behind(tmp_path / "out") == []


def test_a_runtime_that_is_not_installed_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    real = bench.importlib.util.find_spec
    monkeypatch.setattr(
        bench.importlib.util, "find_spec", lambda n: None if n == "openvino" else real(n)
    )
    assert bench.runtimes_here(None) == ["onnxruntime"]
    assert bench.runtimes_here("onnxruntime") == ["onnxruntime"]
    with pytest.raises(UsageError, match=r"pip install 'penjing\[openvino\]'"):
        bench.runtimes_here("openvino")


@pytest.mark.parametrize(("sign", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_leaves_nothing(
    sign: signal.Signals, status: int, place: Path, tmp_path: Path
) -> None:
    command = [
        sys.executable, "-m", "penjing", "fit", str(place / "bert"), "--data",
        str(place / "data.jsonl"), "--max-drop", "50%", "--length", "16", "-o",
        str(tmp_path / "out"),
    ]  # fmt: skip
    process = subprocess.Popen(command, stderr=subprocess.PIPE, env=os.environ, text=True)
    try:
        end = time.monotonic() + 60
        while not left_behind(tmp_path):
            assert process.poll() is None, process.stderr
            assert time.monotonic() < end
            time.sleep(0.05)
        time.sleep(0.3)  # somewhere in the middle of the preflight
        process.send_signal(sign)
        assert process.wait(30) == status
    finally:
        process.kill()
        process.communicate()
    assert left_behind(tmp_path) == []


def test_slope() -> None:
    # By hand: (0.1 * 0.02 + 0.2 * 0.04) / (0.01 + 0.04) = 0.2
    ladder = [Depth([0], 0.1, 0.02), Depth([0, 1], 0.2, 0.04)]
    assert _slope(Survey(ladder=ladder)) == pytest.approx(0.2)
    # A gain by chance is no reason to expect more of it.
    assert _slope(Survey(ladder=[Depth([0], 0.1, -0.5)])) == 0.05
    # (0.2 * 0.04) / (0.01 + 0.04): the gain counts as nothing lost
    ladder = [Depth([0], 0.1, -0.5), Depth([0, 1], 0.2, 0.04)]
    assert _slope(Survey(ladder=ladder)) == pytest.approx(0.16)
    assert _slope(Survey()) == 1.0
    assert _slope(Survey(ladder=[Depth([0], 0.0, 0.0)])) == 1.0
