"""Attention: which layers make queries and keys, ranges by hand, what OpenVINO computes of them."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import BertModel

sys.path.insert(0, str(Path(__file__).parent.parent))
import networks as net
from penjing.apply import apply
from penjing.calibrate import Unit
from penjing.edits import perform
from penjing.errors import InputError, UsageError
from penjing.load import load
from penjing.model import Model
from penjing.packedlayers import pack_model
from penjing.recipe import Edit, Recipe
from penjing.steps.attention import Attention, multiplied
from penjing.steps.quantize import Quantize
from penjing.steps.rotate import Rotate
from penjing.storededits import pack, unpack
from penjing.writers import compressed_tensors, onnx
from penjing.writers.artifact import save

EIGHT = Quantize(bits=8, symmetric=True, activations=8, method="rtn")


def data(count: int = 3) -> list[Any]:
    return [net.text_batch(seed, samples=4) for seed in range(count)]


def made(*steps: Any, model: Model | None = None) -> Model:
    return apply(model or net.bert(2), Recipe(steps or (Attention(),)), data()).model


def queries_and_keys(layers: int) -> list[str]:
    names = ("query", "key")
    return [f"encoder.layer.{i}.attention.self.{n}" for i in range(layers) for n in names]


@pytest.mark.parametrize("way", ["sdpa", "eager"])
def test_the_layers_of_queries_and_keys_are_found_by_running(way: str) -> None:
    model = net.bert(2)
    assert isinstance(model.module, BertModel)
    model.module.set_attn_implementation(way)
    assert multiplied(model, data(1)[0]) == queries_and_keys(2)
    assert list(made(model=model).outputs) == queries_and_keys(2)


class Packed(nn.Module):
    """Queries, keys and values by one layer; and a product of layers that is no attention's."""

    def __init__(self) -> None:
        super().__init__()
        self.all, self.left, self.right = nn.Linear(8, 24), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.all(x).chunk(3, -1)
        y = nn.functional.scaled_dot_product_attention(q, k, v)
        return y + (self.left(x) @ self.right(x).transpose(-1, -2)) @ x


def test_what_one_layer_makes_all_of_is_left() -> None:
    model = net.wrap(Packed(), "tensor", {"x": torch.randn(2, 5, 8)})
    assert multiplied(model, model.example) == ["left", "right"]


def test_outputs_are_rounded_to_a_symmetric_grid() -> None:
    plain, model = net.bert(2), made(Attention("minmax"))
    path = queries_and_keys(2)[0]
    seen: dict[str, torch.Tensor] = {}

    def keep(name: str) -> Any:
        return lambda _, args, output: seen.update({name: output})

    for name, one in (("plain", plain), ("rounded", model)):
        one.module.get_submodule(path).register_forward_hook(keep(name))
    batches = data()
    largest = 0.0
    for batch in batches:
        plain.run(batch)
        largest = max(
            largest, float(seen["plain"][batch["attention_mask"].bool()].abs().max().detach())
        )
    model.run(batches[0]), plain.run(batches[0])
    scale = largest / 127
    want = (seen["plain"] / scale).round().clamp(-128, 127) * scale
    assert torch.allclose(seen["rounded"], want, atol=1e-5)
    assert not torch.allclose(seen["plain"], want, atol=scale / 4)


def test_ranges_are_stored_and_read_back(tmp_path: Path) -> None:
    net.bert(2).module.save_pretrained(tmp_path / "source")
    model = made(EIGHT, Attention(), model=load(tmp_path / "source"))
    save(model, tmp_path / "made")
    again = load(tmp_path / "made")
    assert {p: r.key for p, r in again.outputs.items()} == {
        p: r.key for p, r in model.outputs.items()
    }
    batch = data(1)[0]
    assert torch.equal(again.run(batch), model.run(batch))
    copy = model.copy()
    copy.outputs.clear()
    assert model.outputs
    assert torch.allclose(pack_model(model).run(batch), model.run(batch), atol=1e-4)


def test_edits_are_kept_in_a_journal() -> None:
    plain = net.bert(2)
    unit = Unit("", plain, {}, None, None, batches=data())
    edits = list(Attention().plan(unit, {}))
    again = plain.copy()
    for edit in unpack(*pack(edits)):
        perform(again, edit)
    batch = data(1)[0]
    assert torch.equal(again.run(batch), made(model=plain).run(batch))
    assert not torch.equal(plain.run(batch), again.run(batch))


def test_a_cut_moves_ranges_with_their_blocks() -> None:
    model = made(Attention(), model=net.bert(3))
    third = model.outputs[queries_and_keys(3)[4]]
    perform(cut := model.copy(), Edit("drop", "encoder.layer.1", None, "gone"))
    assert list(cut.outputs) == queries_and_keys(2)
    assert cut.outputs[queries_and_keys(2)[2]].key == third.key


def test_openvino_multiplies_them_as_integers(tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    from penjing.runtimes import openvino as runtime
    from penjing.writers import openvino as writer

    model = made(EIGHT, Attention())
    precisions = []
    for name, one in (("with", model), ("without", made(EIGHT))):
        writer.write(one, tmp_path / name)
        session = runtime.open(tmp_path / name, threads=1)
        batch = net.text_batch(9, samples=3)
        got = session.run({n: x.numpy() for n, x in batch.items()})
        want = one.run(batch).detach().numpy()
        # Codes that fall to the other side of a half move an output by a step of a grid.
        assert abs(got - want).mean() < 0.02 * abs(want).mean()
        ops = session.compiled.get_runtime_model().get_ops()
        info = [node.get_rt_info() for node in ops]
        kinds = [i["outputPrecisions"].astype(str) for i in info
                 if i["layerType"].astype(str) == "FullyConnected"]  # fmt: skip
        precisions.append(kinds.count("i8"))  # what nobody rounds is read in floats
    assert precisions == [4, 0]


def test_no_other_writer_takes_them(tmp_path: Path) -> None:
    net.bert(2).module.save_pretrained(tmp_path)
    model = made(model=load(tmp_path))
    assert any("8-bit queries or keys" in line for line in onnx.check(model))
    assert any("8-bit outputs" in line for line in compressed_tensors.check(model))


def test_bad_input_is_named() -> None:
    with pytest.raises(UsageError, match="queries and keys"):
        made(model=net.llama(2))  # rotated between the layer and the product
    with pytest.raises(UsageError, match="observer"):
        Attention("median")
    with pytest.raises(InputError, match="data"):
        apply(net.bert(2), Recipe((Attention(),)))
    broken = net.bert(2)
    broken.module.get_parameter("encoder.layer.0.attention.self.key.bias").data[0] = torch.nan
    with pytest.raises(InputError, match="NaN"):
        made(model=broken)


def test_a_rotated_head_is_still_found() -> None:
    model = made(Rotate(stream=False), Attention())
    assert list(model.outputs) == queries_and_keys(2)
