from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import transformers

from penjing.errors import InputError, UsageError
from penjing.load import build, load, original
from penjing.model import Source


def test_each_kind_goes_to_its_reader(tmp_path: Path) -> None:
    np.save(tmp_path / "w.npy", np.eye(3))
    assert load(tmp_path / "w.npy").interface == "weights"
    assert load(str(tmp_path / "w.npy")).source.kind == "weights"
    config = transformers.BertConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=8,
        vocab_size=9,
    )
    transformers.BertModel(config).save_pretrained(tmp_path / "bert")
    model = load(tmp_path / "bert")
    assert model.source.kind == "huggingface"
    assert model.blocks == ("encoder.layer.0", "encoder.layer.1")
    assert int(model.example["input_ids"].max()) < 9
    assert model.example["input_ids"].shape == model.example["attention_mask"].shape == (2, 8)


def test_what_is_not_a_model_is_refused_with_what_is(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("hello")
    (tmp_path / "model.onnx").write_bytes(b"")
    (tmp_path / "empty").mkdir()
    os.mkfifo(tmp_path / "pipe.gguf")
    cases = {
        tmp_path / "gone": "no such file or folder; got .*gone; next: ",
        tmp_path / ("long" * 100): "no such file or folder",
        tmp_path / "nul\0": "no such file or folder",
        tmp_path / "notes.txt": "not a model; .*allowed: .*config.json.*gguf.*npz.*artifact",
        tmp_path / "empty": "not a model",
        tmp_path / "model.onnx": "ONNX",
        tmp_path / "pipe.gguf": "not a regular file",
        Path("/dev/zero"): "not a model",
        Path("gone.py:function"): "no such Python file|needs weights",
    }
    for path, message in cases.items():
        with pytest.raises(InputError, match=message):
            load(path)
    np.save(tmp_path / "w.npy", np.eye(3))
    with pytest.raises(UsageError, match="only for a factory"):
        load(tmp_path / "w.npy", weights="w.pth")
    with pytest.raises(InputError, match="kind of source"):
        build(Source("pickle", "x", ""))


def test_the_original_does_not_depend_on_the_working_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    np.save(tmp_path / "w.npy", np.eye(3))
    monkeypatch.chdir(tmp_path)
    model = load("w.npy")
    assert model.source.path == "w.npy"
    monkeypatch.chdir("/")
    assert original(model).source.fingerprint == model.source.fingerprint
