import collections
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import nn
from transformers import BertConfig, BertModel

from penjing import edits
from penjing.apply import apply
from penjing.errors import ExportError, UsageError
from penjing.export import export, probes, tolerance
from penjing.load import load
from penjing.model import Model, Source
from penjing.planes import Scheme
from penjing.quantizers import rtn
from penjing.recipe import ActivationRange, Edit, Recipe
from penjing.registry import lookup
from penjing.steps.quantize import Quantize
from penjing.writers._compressed import _words
from penjing.writers.artifact import save as write_artifact

SOURCE = Source("huggingface", "tiny", "0")  # one object: the encoder is traced once


def encoder() -> Model:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=48, max_position_embeddings=24,
    )  # fmt: skip
    ids = torch.randint(50, (1, 6))
    example = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    module = BertModel(config, add_pooling_layer=False).eval()
    return Model(module, "embedding", example, SOURCE)


def test_the_probes_differ_in_size_and_padding_and_fit_the_network() -> None:
    batches = list(probes(encoder()))
    shapes = [tuple(b["input_ids"].shape) for b in batches]
    assert shapes == [(1, 6), (1, 7), (3, 20), (2, 24), (4, 12)]  # 24 positions
    assert any((b["attention_mask"] == 0).any() for b in batches)
    assert all(b["attention_mask"][:, 0].all() for b in batches)


def test_a_float_model_agrees(tmp_path: Path) -> None:
    found = export(encoder(), tmp_path, ["onnx"])
    assert found["onnx"] < 1e-5
    assert [p.name for p in tmp_path.iterdir()] == ["model.onnx"]


def test_every_kind_of_quantization_passes_its_own_gate(tmp_path: Path) -> None:
    model = encoder()
    name = "embeddings.word_embeddings.weight"
    table = rtn.fit(model.module.get_parameter(name).detach(), Scheme(4, 16), None)
    edits.perform(model, Edit("quantize", name, table, "test"))
    assert tolerance(model) == 1e-3
    assert export(model, tmp_path)["onnx"] < 1e-5
    matrix = "encoder.layer.0.output.dense"
    weight = model.module.get_parameter(f"{matrix}.weight").detach()
    planes = rtn.fit(weight, Scheme(8, 0, True), None)
    edits.perform(model, Edit("quantize", f"{matrix}.weight", planes, "test"))
    assert 1e-5 < export(model, tmp_path)["onnx"] < tolerance(model) == 0.15
    edits.perform(model, Edit("activation", matrix, ActivationRange(0.02, 128), "test"))
    assert export(model, tmp_path)["onnx"] < tolerance(model) == 0.3


class Lies(nn.Module):
    """Computes something else while it is traced."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * (1.01 if torch.compiler.is_exporting() else 1.0)


def test_a_file_that_disagrees_is_refused_and_nothing_is_left(tmp_path: Path) -> None:
    source = Source("factory", "tiny", "0")
    model = Model(Lies(), "tensor", {"x": torch.randn(2, 4)}, source)
    (tmp_path / "model.onnx").write_text("as it was")
    with pytest.raises(ExportError, match=r"deviation of 0\.01"):
        export(model, tmp_path)
    assert [p.read_text() for p in tmp_path.iterdir()] == ["as it was"]


class Steep(nn.Module):
    """Magnifies what its product is off by."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(64, 64, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.sin(30 * self.layer(x))


def test_a_network_that_magnifies_rounding_is_allowed_twice_its_own(tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 64)
    model = Model(Steep().eval(), "tensor", {"x": x}, Source("factory", "tiny", "0"))
    edited = apply(model, Recipe((Quantize(4, 32, method="rtn"),))).model
    weight = edited.module.layer.weight.detach().numpy()
    own = 0.0
    for batch in probes(edited):
        seen = batch["x"].numpy()
        parts = seen.reshape(len(seen), 2, 32)
        scale = np.abs(parts).max(-1, keepdims=True) / 127
        rounded = (np.round(parts / scale) * scale).reshape(seen.shape)
        was, now = (np.sin(30 * v @ weight.T) for v in (seen, rounded))
        off = np.linalg.norm(now - was, axis=1) / np.linalg.norm(was, axis=1)
        own = max(own, float(off.max()))
    assert tolerance(edited) == 0.15
    assert 0.15 < 2 * own < 0.5
    assert tolerance(edited, found=0.2) == pytest.approx(2 * own, rel=1e-3)
    # A plain network is not allowed more, however far off its file is.
    edited.module.forward = edited.module.layer.forward
    assert tolerance(edited, found=0.2) == 0.15


class Branches(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x if x.sum() > 0 else -x


def test_a_network_that_cannot_be_traced_says_so(tmp_path: Path) -> None:
    model = Model(Branches(), "tensor", {"x": torch.randn(2, 4)}, Source("factory", "t", "0"))
    with pytest.raises(ExportError, match="cannot be traced"):
        export(model, tmp_path)
    assert not list(tmp_path.iterdir())


def test_an_unknown_target_lists_the_targets(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="onnx, openvino"):
        export(encoder(), tmp_path, ["tflite"])


def test_files_that_no_runtime_here_runs_are_read_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = encoder()
    path = tmp_path / "source"
    found.module.save_pretrained(path)  # type: ignore[operator]
    model = load(path)
    assert tolerance(model, "compressed-tensors") == 1e-3
    name = "encoder.layer.0.output.dense.weight"
    planes = rtn.fit(model.module.get_parameter(name).detach(), Scheme(4, 16), None)
    edits.perform(model, Edit("quantize", name, planes, "test"))
    assert tolerance(model, "compressed-tensors") == 0.01
    out = tmp_path / "out"
    out.mkdir()
    assert export(model, out, ["compressed-tensors"])["compressed-tensors"] < 1e-5
    assert (out / "compressed-tensors" / "config.json").is_file()
    with pytest.raises(ExportError, match="carried over from a GGUF file"):
        export(model, out, ["gguf"])
    from penjing.writers import _compressed

    monkeypatch.setattr(_compressed, "_words", lambda codes, bits: _words(15 - codes, bits))
    with pytest.raises(ExportError, match="compressed-tensors file does not agree"):
        export(model, out, ["compressed-tensors"])
    assert [p.name for p in out.iterdir()] == ["compressed-tensors"]


@pytest.mark.parametrize(
    ("codes", "bits", "targets"),
    [("integer", 4, ["onnx", "openvino"]), ("binary", 2, ["onnx", "openvino"])],
)
def test_a_rotated_network_is_stored_loaded_and_exported(
    codes: str, bits: int, targets: list[str], tmp_path: Path
) -> None:
    if "openvino" in targets:
        pytest.importorskip("openvino")
    source = tmp_path / "source"
    encoder().module.save_pretrained(source)  # type: ignore[operator]
    model = load(source)
    step = Quantize(bits, codes=codes, method="rtn", rotate=True, skip=("embeddings.*",))
    small = apply(model, Recipe((step,))).model
    assert {planes.rotation for planes in small.planes.values()} == {0}
    write_artifact(small, tmp_path / "out")
    again = load(tmp_path / "out")
    # A plain torch module: its weights are in their own basis, and nothing is rotated in it.
    assert not any(m._forward_pre_hooks for m in again.module.modules())
    for name, weight in small.module.state_dict().items():
        assert torch.equal(again.module.state_dict()[name], weight), name
    assert export(again, tmp_path / "out", targets)["onnx"] < 0.1
    proto = onnx.load(tmp_path / "out" / "model.onnx")
    kinds = collections.Counter(node.op_type for node in proto.graph.node)
    # Inputs of q, k and v, of the output projection, of both layers of the MLP.
    assert kinds["Shape"] >= 4
    signs = [t for t in proto.graph.initializer if "signs" in t.name]
    assert sorted(t.dims[0] for t in signs) == [32, 48]
    for target in ("gguf", "compressed-tensors"):
        lines = lookup("writers", target, "check")(again)
        assert target == "gguf" or "rotated" in lines[0]


def test_pictures_are_probed_within_what_was_calibrated() -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()).eval()
    x = torch.randn(2, 3, 8, 8)
    model = Model(module, "tensor", {"x": x}, Source("factory", "tiny", "0"))
    images = [{"x": torch.rand(4, 3, 8, 8)}]  # 0 to 1
    step = Quantize(8, symmetric=True, activations=8, method="rtn")
    edited = apply(model, Recipe((step,)), images).model
    assert min(float(b["x"].min()) for b in probes(model)) < -1
    for batch in probes(edited):
        assert float(batch["x"].min()) >= -0.01
        assert float(batch["x"].max()) <= 1.01
