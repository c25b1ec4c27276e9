"""Whole, damaged and crafted artifacts."""

import json
from pathlib import Path

import pytest
import torch
from transformers import BertConfig, BertModel

from penjing.errors import InputError
from penjing.export import export
from penjing.load import load
from penjing.verify import Check, verify
from penjing.writers.artifact import save


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("verify")
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=60,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=64,
    )
    BertModel(config, add_pooling_layer=False).save_pretrained(place / "source")
    (place / "source" / "vocab.txt").write_text(
        "\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{i}" for i in range(55))])
    )
    (place / "source" / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "BertTokenizer"})
    )
    model = load(place / "source")
    save(model, place / "artifact", extra=lambda folder: export(model, folder, ["onnx"]) and None)
    return place / "artifact"


@pytest.fixture
def artifact(made: Path, tmp_path: Path) -> Path:
    import shutil

    return Path(shutil.copytree(made, tmp_path / "artifact"))


def failed(checks: list[Check]) -> set[str]:
    return {check.name for check in checks if not check.ok}


def rewrite(artifact: Path, name: str) -> None:
    """Make the manifest agree with a changed file, as a forger would."""
    from penjing.files import sha256

    manifest = json.loads((artifact / "manifest.json").read_text())
    path = artifact / name
    manifest["files"][name] = {"size": path.stat().st_size, "sha256": sha256(path)}
    (artifact / "manifest.json").write_text(json.dumps(manifest))


def test_a_whole_artifact_passes(artifact: Path) -> None:
    checks = verify(artifact)
    assert failed(checks) == set()
    names = {check.name for check in checks}
    assert {"model.onnx", "structure.json", "structure", "parity onnx"} <= names


def test_one_changed_byte_names_its_file(artifact: Path) -> None:
    shard = next((artifact / "weights").iterdir())
    data = bytearray(shard.read_bytes())
    data[-3] ^= 1
    shard.write_bytes(data)
    assert f"weights/{shard.name}" in failed(verify(artifact))
    assert "model.onnx" not in failed(verify(artifact))


def test_missing_and_surplus_files_are_named(artifact: Path) -> None:
    (artifact / "assets").mkdir(exist_ok=True)
    (artifact / "assets" / "more.txt").write_text("x")
    gone = next((artifact / "weights").iterdir())
    gone.unlink()
    assert {"assets/more.txt", f"weights/{gone.name}", "structure", "parity onnx"} <= failed(
        verify(artifact)
    )


def test_a_forged_export_fails_parity(artifact: Path) -> None:
    import onnx
    from onnx import numpy_helper

    graph = onnx.load(artifact / "model.onnx")
    largest = max(graph.graph.initializer, key=lambda t: len(t.raw_data))
    value = numpy_helper.to_array(largest) * 3
    largest.CopyFrom(numpy_helper.from_array(value.astype("float32"), largest.name))
    onnx.save(graph, artifact / "model.onnx")
    rewrite(artifact, "model.onnx")
    assert failed(verify(artifact)) == {"parity onnx"}


def test_ill_formed_results_are_found(artifact: Path) -> None:
    (artifact / "results.json").write_text('{"format": 1, "after": 3, "before": 4}')
    rewrite(artifact, "results.json")
    assert failed(verify(artifact)) == {"results.json"}


def test_a_manifest_may_not_point_outside(artifact: Path) -> None:
    (artifact.parent / "secret").write_text("x")
    manifest = json.loads((artifact / "manifest.json").read_text())
    manifest["files"]["../secret"] = {"size": 1, "sha256": "0"}
    (artifact / "manifest.json").write_text(json.dumps(manifest))
    check = next(c for c in verify(artifact) if c.name == "../secret")
    assert not check.ok
    assert "outside" in check.detail


def test_no_artifact_is_an_input_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"manifest\.json"):
        verify(tmp_path)
