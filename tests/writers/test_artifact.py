from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from penjing.edits import perform
from penjing.errors import InputError, UsageError
from penjing.inspect import inspect
from penjing.load import load, original
from penjing.model import Model
from penjing.planes import IntegerPlanes, Scheme, round_scales
from penjing.quantizers import rtn
from penjing.readers import artifact as reader
from penjing.recipe import ActivationRange, Edit, Patch, Recipe, Slice
from penjing.verify import verify
from penjing.writers import artifact


def _llama(folder: Path) -> Path:
    config = transformers.LlamaConfig(
        hidden_size=16, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=24, vocab_size=50, max_position_embeddings=32, tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture
def model(tmp_path: Path) -> Model:
    return load(_llama(tmp_path / "source"))


def _planes(shape: tuple[int, int], bits: int, group: int) -> IntegerPlanes:
    generator = torch.Generator().manual_seed(bits)
    groups = -(-shape[1] // group)
    return IntegerPlanes(
        torch.randint(0, 2**bits, (1, *shape), generator=generator).to(torch.uint8),
        (bits,),
        torch.rand(1, shape[0], groups, generator=generator) * 0.02,
        -torch.rand(shape[0], groups, generator=generator) * 0.1,
        group,
    )


def _edit_everything(model: Model) -> None:
    layer = "model.layers"
    perform(model, Edit("drop", f"{layer}.1", None, "test"))
    kept = torch.tensor([0, 3, 4, 9, 20])
    slices = [Slice(f"{layer}.0.mlp.{n}_proj.weight", 0, kept) for n in ("gate", "up")]
    slices.append(Slice(f"{layer}.0.mlp.down_proj.weight", 1, kept))
    perform(model, Edit("slice", f"{layer}.0", tuple(slices), "test"))
    generator = torch.Generator().manual_seed(9)
    patch = Patch(
        torch.eye(16) + 0.1 * torch.randn(16, 16, generator=generator), torch.ones(16), "before"
    )
    perform(model, Edit("patch", f"{layer}.1", patch, "test"))
    mask = torch.rand(16, 16, generator=generator) > 0.5
    perform(model, Edit("mask", f"{layer}.0.self_attn.o_proj.weight", mask, "test"))
    perform(
        model, Edit("quantize", f"{layer}.1.mlp.up_proj.weight", _planes((24, 16), 3, 5), "test")
    )
    perform(model, Edit("quantize", "model.embed_tokens.weight", _planes((50, 16), 8, 16), "test"))
    scale = ActivationRange(0.05, 128)
    perform(model, Edit("activation", f"{layer}.1.mlp.down_proj", scale, "test"))


def test_an_edited_model_comes_back_bit_for_bit(model: Model, tmp_path: Path) -> None:
    before = model.run(model.example)
    _edit_everything(model)
    artifact.save(model, tmp_path / "out", recipe=None, metrics={"quality": 0.5})
    again = load(tmp_path / "out")
    assert not torch.equal(before, model.run(model.example))
    assert torch.equal(again.run(again.example), model.run(model.example))
    assert again.structure == model.structure
    assert again.blocks == model.blocks == ("model.layers.0", "model.layers.1")
    assert again.tied() == model.tied() != []
    assert again.planes.keys() == model.planes.keys()
    for name, planes in model.planes.items():
        assert torch.equal(again.planes[name].codes, planes.codes)
    for name, mask in model.masks.items():
        assert torch.equal(again.masks[name], mask)
    found = again.activations["model.layers.1.mlp.down_proj"]
    assert (found.scale, found.zero_point) == (0.05, 128)
    # What was read can be written and read once more, to the same bytes.
    artifact.save(again, tmp_path / "twice", metrics={"quality": 0.5})
    for name in ("weights/model-00001.safetensors", "structure.json", "manifest.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "twice" / name).read_bytes()


def test_quantized_weights_are_stored_packed(model: Model, tmp_path: Path) -> None:
    artifact.save(model, tmp_path / "plain")
    perform(model, Edit("quantize", "model.embed_tokens.weight", _planes((50, 16), 4, 16), "test"))
    artifact.save(model, tmp_path / "packed")
    plain, packed = (
        (tmp_path / name / "weights/model-00001.safetensors").stat().st_size
        for name in ("plain", "packed")
    )
    # 50 rows: 16 floats of 4 bytes against 8 bytes of codes, a scale and a shift.
    assert 50 * (64 - 16) - 300 <= plain - packed <= 50 * (64 - 16) + 300


def test_the_manifest_lists_every_file(model: Model, tmp_path: Path) -> None:
    def extra(folder: Path) -> None:
        (folder / "sub").mkdir()
        (folder / "sub/model.onnx").write_bytes(b"1234")

    artifact.save(model, tmp_path / "out", recipe=Recipe((), seed=7), extra=extra)
    manifest = json.loads((tmp_path / "out/manifest.json").read_text())
    assert manifest["seed"] == 7
    found = {
        p.relative_to(tmp_path / "out").as_posix()
        for p in (tmp_path / "out").rglob("*")
        if p.is_file()
    }
    assert set(manifest["files"]) == found - {"manifest.json"}
    assert manifest["files"]["sub/model.onnx"]["sha256"] == hashlib.sha256(b"1234").hexdigest()


def test_shards(model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(artifact, "_SHARD", 5000)
    artifact.save(model, tmp_path / "out")
    shards = list((tmp_path / "out/weights").iterdir())
    assert len(shards) > 2
    assert all(p.stat().st_size < 5000 + 3000 for p in shards)
    again = load(tmp_path / "out")
    assert torch.equal(again.run(again.example), model.run(model.example))


def test_extend_adds_whole_or_not_at_all(model: Model, tmp_path: Path) -> None:
    out = tmp_path / "out"
    artifact.save(model, out, metrics={"a": 1}, extra=lambda f: (f / "old.txt").write_text("old"))
    artifact.extend(out, lambda folder: (folder / "new.txt").write_text("new"), metrics={"b": 2})
    manifest = reader.check(out, of=("",))
    assert {"old.txt", "new.txt"} <= set(manifest["files"])
    assert manifest["metrics"] == {"a": 1, "b": 2}
    state = {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}

    def fails(folder: Path) -> None:
        (folder / "old.txt").write_text("spoiled")
        raise InputError("no")

    with pytest.raises(InputError, match="no"):
        artifact.extend(out, fails)
    assert {p: p.read_bytes() for p in out.rglob("*") if p.is_file()} == state
    assert {p.name for p in tmp_path.iterdir()} == {"out", "source"}


def test_the_original_is_found_again_or_missed(model: Model, tmp_path: Path) -> None:
    before = model.run(model.example)
    _edit_everything(model)
    artifact.save(model, tmp_path / "out")
    again = load(tmp_path / "out")
    assert torch.equal(original(again).run(model.example), before)
    weights = tmp_path / "source/model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(InputError, match="has changed since"):
        original(again)
    weights.unlink()
    with pytest.raises(InputError, match="cannot be read again"):
        original(again)
    # The artifact does not need the original.
    assert torch.equal(load(tmp_path / "out").run(model.example), again.run(model.example))


def _spoil(out: Path, file: str, change: Any) -> None:
    path = out / file
    table = json.loads(path.read_text())
    change(table)
    path.write_text(json.dumps(table))
    if file != "manifest.json":
        _sign(out, file)


def _sign(out: Path, file: str) -> None:
    """The manifest says of a spoiled file that it is as it was written."""
    content = (out / file).read_bytes()
    new = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    _spoil(out, "manifest.json", lambda t: t["files"].update({file: new}))


def test_indices_are_runs_and_lists_of_before_still_load(model: Model, tmp_path: Path) -> None:
    _edit_everything(model)
    artifact.save(model, tmp_path / "out")
    (wanted,) = [e["slices"] for e in model.structure if e["kind"] == "slice"]
    table = json.loads((tmp_path / "out" / "structure.json").read_text())
    (stored,) = [e["slices"] for e in table["structure"] if e["kind"] == "slice"]
    for (_, _, text), (_, _, kept) in zip(stored, wanted, strict=True):
        parts = [list(map(int, run.split("-"))) for run in text.split()]
        assert [i for run in parts for i in range(run[0], run[-1] + 1)] == kept

    def before(table: dict[str, Any]) -> None:
        table["format"] = 1
        table["structure"] = model.structure

    assert load(tmp_path / "out").structure == model.structure
    _spoil(tmp_path / "out", "structure.json", before)
    again = load(tmp_path / "out")
    assert again.structure == model.structure
    assert torch.equal(again.run(model.example), model.run(model.example))


SPOILED: list[tuple[str, Any, str]] = [
    ("structure.json", lambda t: t.update(format=3), "format of .*got 3; allowed: 1 or 2"),
    (
        "structure.json",
        lambda t: t["structure"].append(
            {"kind": "slice", "path": "x", "slices": [["x", 0, "0-9999999999"]]}
        ),
        "does not fit",
    ),
    ("manifest.json", lambda t: t.update(format=99), "format 99"),
    ("manifest.json", lambda t: t.pop("files"), "not an artifact"),
    ("manifest.json", lambda t: t["files"].update({"../x": {"size": 1}}), "outside"),
    ("manifest.json", lambda t: t["files"].update({"gone": {"size": 1}}), "no such file"),
    ("structure.json", lambda t: t.pop("source"), "does not fit"),
    ("structure.json", lambda t: t["source"].update(kind="pickle"), "kind of source"),
    ("structure.json", lambda t: t["structure"].append({"kind": "evil", "path": "x"}), "evil"),
    ("structure.json", lambda t: t["structure"].append({"kind": "drop", "path": "no.1"}), "fit"),
    ("structure.json", lambda t: t["structure"].append(3), "does not fit"),
    (
        "structure.json",
        lambda t: t["structure"].append({"kind": "drop", "path": "model.layers.0"}),
        r"no place for.*model\.layers\.2",
    ),
    (
        "structure.json",
        lambda t: t["source"]["details"]["config"].update(auto_map={"A": "b"}),
        "auto_map",
    ),
    ("structure.json", lambda t: t["planes"].update({"lm_head.weight": {"bits": [4]}}), "not fit"),
]


@pytest.mark.parametrize(("file", "change", "message"), SPOILED, ids=[s[2] for s in SPOILED])
def test_spoiled_artifacts_are_refused(
    model: Model, tmp_path: Path, file: str, change: Any, message: str
) -> None:
    artifact.save(model, tmp_path / "out")
    _spoil(tmp_path / "out", file, change)
    with pytest.raises(InputError, match=message):
        load(tmp_path / "out")


def test_a_flipped_bit_is_found_by_hash_and_a_cut_file_by_size(
    model: Model, tmp_path: Path
) -> None:
    artifact.save(model, tmp_path / "out")
    path = tmp_path / "out/weights/model-00001.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    reader.check(tmp_path / "out", of=())
    for reads in (reader.check, load):
        with pytest.raises(InputError, match="has changed"):
            reads(tmp_path / "out")
    with pytest.raises(InputError, match="has changed"):  # and gets no new manifest
        artifact.extend(tmp_path / "out", lambda folder: None)
    assert json.loads((tmp_path / "out/manifest.json").read_text())["files"]
    path.write_bytes(content[:-1])
    with pytest.raises(InputError, match="has changed"):
        load(tmp_path / "out")


def test_an_existing_output_is_kept(model: Model, tmp_path: Path) -> None:
    artifact.save(model, tmp_path / "out")
    with pytest.raises(InputError, match="exists"):
        artifact.save(model, tmp_path / "out")
    artifact.save(model, tmp_path / "out", overwrite=True)
    assert {p.name for p in tmp_path.iterdir()} == {"out", "source"}


def _nested(weight: torch.Tensor) -> IntegerPlanes:
    """2 + 1 + 1 bits: plane k halves the step of what the planes before it left."""
    step = weight.abs().amax(1, keepdim=True) / 2
    codes, scales, rest, nested = [], [], weight, {}
    for bits, centre in ((2, 1.5), (1, 0.5), (1, 0.5)):
        code = (rest / step + centre).round().clamp(0, 2**bits - 1)
        codes.append(code.to(torch.uint8))
        scales.append(step)
        rest = rest - step * (code - centre)
        shift = -sum(c * s for c, s in zip((1.5, 0.5, 0.5), scales, strict=False))
        nested[len(codes)] = (torch.stack(scales), shift)
        step = step / 2
    scale, shift = nested.pop(3)
    return IntegerPlanes(
        torch.stack(codes), (2, 1, 1), scale, shift, weight.shape[1],
        offset="centre", centre=(1.5, 0.5, 0.5), nested_scales=nested,
    )  # fmt: skip


def test_two_three_and_four_bits_from_one_artifact(model: Model, tmp_path: Path) -> None:
    names = [f"model.layers.{n}.mlp.up_proj.weight" for n in range(3)]
    before = {name: model.module.get_parameter(name).detach().clone() for name in names}
    for name in names[:2]:
        perform(model, Edit("quantize", name, _nested(before[name]), "test"))
    perform(model, Edit("quantize", names[2], _planes((24, 16), 4, 16), "test"))
    artifact.save(model, tmp_path / "out")
    errors = []
    for planes in (1, 2, 3):
        again = load(tmp_path / "out", planes=planes)
        assert [len(again.planes[n].bits) for n in names] == [planes, planes, 1]
        values = again.module.get_parameter(names[0]).detach()
        assert torch.equal(values, model.planes[names[0]].nested(planes).dequantize())
        errors.append(float((values - before[names[0]]).norm()))
        # What was read so is an artifact of its own.
        artifact.save(again, tmp_path / f"only-{planes}")
        once = load(tmp_path / f"only-{planes}")
        assert torch.equal(once.run(once.example), again.run(again.example))
    assert errors[0] > 1.6 * errors[1] > 2.5 * errors[2]
    for planes in (0, 4):
        with pytest.raises(UsageError, match=r"planes.*1 to 3"):
            load(tmp_path / "out", planes=planes)
    with pytest.raises(UsageError, match="artifact"):
        load(tmp_path / "source", planes=2)


def test_every_way_to_store_a_weight(model: Model, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    scale = round_scales(torch.rand(1, 24, 2, generator=generator), 8)
    codes = torch.randint(0, 3, (1, 24, 16), generator=generator).to(torch.uint8)
    vectors = torch.randint(0, 300, (2, 24, 2), generator=generator).to(torch.int32)
    tables = torch.randint(-99, 99, (2, 300, 8), generator=generator).to(torch.int8)
    both = scale.expand(2, -1, -1).contiguous()
    ways = {
        "gate": IntegerPlanes(
            codes, (1.6,), scale, -scale[0], 8, scale_bits=8, offset="centre", centre=(1.0,)
        ),
        "up": IntegerPlanes(
            vectors, (9, 9), both, torch.zeros(24, 2), 8, tables=tables, scale_bits=8
        ),
        "q": rtn.fit(torch.randn(16, 16, generator=generator), Scheme(3, 8, scale_bits=16)),
    }
    names = {
        k: f"model.layers.0.{'self_attn' if k == 'q' else 'mlp'}.{k}_proj.weight" for k in ways
    }
    for key, planes in ways.items():
        perform(model, Edit("quantize", names[key], planes, "test"))
    artifact.save(model, tmp_path / "out")
    again = load(tmp_path / "out")
    for key, planes in ways.items():
        assert torch.equal(again.planes[names[key]].codes, planes.codes)
        assert torch.equal(again.module.get_parameter(names[key]).detach(), planes.dequantize())
        assert again.planes[names[key]].stored_bytes == planes.stored_bytes
    assert torch.equal(again.run(again.example), model.run(model.example))


def test_a_zero_point_and_a_half_scale_cost_their_bits(model: Model, tmp_path: Path) -> None:
    sizes = []
    for number, scheme in enumerate((Scheme(4, 8), Scheme(4, 8, scale_bits=16))):
        twin = model.copy()
        weight = twin.module.get_parameter("model.embed_tokens.weight").detach()
        planes = rtn.fit(weight, scheme)
        perform(twin, Edit("quantize", "model.embed_tokens.weight", planes, "test"))
        artifact.save(twin, tmp_path / str(number))
        with safe_open(tmp_path / str(number) / "weights/model-00001.safetensors", "pt") as file:
            stored = [n for n in file.keys() if "::" in n]  # noqa: SIM118
            sizes.append(sum(file.get_tensor(n).nbytes for n in stored))
    # 50 rows of 16 codes, 2 groups a row: codes 8 B, zero points 1 B, scales 8 or 4 B a row.
    assert sizes == [50 * (8 + 1 + 8), 50 * (8 + 1 + 4)]


PRUNED = "model.layers.0.mlp.up_proj.weight"
WEIGHTS = "weights/model-00001.safetensors"


def _prune(model: Model, share: float, name: str = PRUNED) -> None:
    weight = model.module.get_parameter(name)
    generator = torch.Generator().manual_seed(3)
    mask = torch.rand(weight.shape, generator=generator) >= share
    perform(model, Edit("mask", name, mask, "test"))


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().contiguous().view(torch.int32)


@pytest.mark.parametrize("share", [0.5, 0.9, 1.0])
def test_what_was_pruned_is_stored_as_bits_and_values(
    model: Model, tmp_path: Path, share: float
) -> None:
    artifact.save(model, tmp_path / "dense")
    _prune(model, share)
    _prune(model, share, "model.embed_tokens.weight")  # tied to the head
    artifact.save(model, tmp_path / "out")
    kept = sum(int(mask.sum()) for mask in model.masks.values())
    count = 24 * 16 + 50 * 16
    stored = load_file(tmp_path / "out" / WEIGHTS)
    parts = {n: t for n, t in stored.items() if "::" in n}
    assert sorted(parts) == sorted(f"{n}::{p}" for n in model.masks for p in ("bits", "values"))
    saved = sum(t.nbytes for t in load_file(tmp_path / "dense" / WEIGHTS).values())
    saved -= sum(t.nbytes for t in stored.values())
    assert saved == 4 * count - (count // 8 + 4 * kept)
    again = load(tmp_path / "out")
    for name, parameter in model.parameters():
        found = again.module.get_parameter(name)
        assert torch.equal(_bits(found), _bits(parameter)), name
    assert all(torch.equal(again.masks[n], mask) for n, mask in model.masks.items())
    assert again.tied() == model.tied() != []
    assert torch.equal(again.run(again.example), model.run(model.example))
    assert all(check.ok for check in verify(tmp_path / "out"))
    artifact.save(again, tmp_path / "twice")
    assert (tmp_path / "twice" / WEIGHTS).read_bytes() == (tmp_path / "out" / WEIGHTS).read_bytes()
    # What is said of the bytes is what the file holds, the tables of the header aside.
    whole = sum(t.nbytes for t in stored.values())
    for one in (model, again):
        assert inspect(one, latency=False).totals.bytes == whole
        assert one.stored_bits() == pytest.approx(8 * whole / one.parameter_count)


def test_few_zeros_are_stored_as_numbers(model: Model, tmp_path: Path) -> None:
    _prune(model, 0.02)
    artifact.save(model, tmp_path / "out")
    assert not [n for n in load_file(tmp_path / "out" / WEIGHTS) if "::" in n]
    again = load(tmp_path / "out")
    assert torch.equal(again.masks[PRUNED], model.masks[PRUNED])
    assert model.stored_bits() == again.stored_bits() == 32


TABLE = "model.embed_tokens.weight"


def _quantize_pruned(model: Model, bits: int, share: float) -> IntegerPlanes:
    weight = model.module.get_parameter(TABLE).detach()
    _prune(model, share, TABLE)
    planes = rtn.fit(weight * model.masks[TABLE], Scheme(bits, 16, False), None)
    perform(model, Edit("quantize", TABLE, planes, "test"))
    return planes


@pytest.mark.parametrize("share", [0.0, 0.6])
def test_what_was_pruned_and_then_quantized_is_stored_as_bits_and_codes(
    model: Model, tmp_path: Path, share: float
) -> None:
    planes = _quantize_pruned(model, 8, share)
    artifact.save(model, tmp_path / "out")
    stored = load_file(tmp_path / "out" / WEIGHTS)
    own = {n.partition("::")[2]: t for n, t in stored.items() if n.startswith(f"{TABLE}::")}
    assert ("bits" in own) is (share > 0)
    assert sum(t.nbytes for t in own.values()) == model.stored_bytes(TABLE)
    if share:
        kept = int((model.module.get_parameter(TABLE) != 0).sum())
        assert model.stored_bytes(TABLE) == planes.stored_bytes - 800 + 100 + kept
    again = load(tmp_path / "out")
    assert torch.equal(again.planes[TABLE].codes, planes.codes)
    assert torch.equal(again.run(again.example), model.run(model.example))
    assert all(check.ok for check in verify(tmp_path / "out"))
    artifact.save(again, tmp_path / "twice")
    assert (tmp_path / "twice" / WEIGHTS).read_bytes() == (tmp_path / "out" / WEIGHTS).read_bytes()
    assert inspect(again, latency=False).totals.bytes == sum(t.nbytes for t in stored.values())


def test_a_tied_weight_that_is_quantized_under_its_other_name_is_stored_once(
    model: Model, tmp_path: Path
) -> None:
    _prune(model, 0.6, TABLE)
    weight = model.module.get_parameter(TABLE).detach()
    planes = rtn.fit(weight, Scheme(8, 16, True), None)
    perform(model, Edit("quantize", "lm_head.weight", planes, "test"))
    artifact.save(model, tmp_path / "out")
    stored = load_file(tmp_path / "out" / WEIGHTS)
    assert {n.partition("::")[0] for n in stored if "::" in n} == {"lm_head.weight"}
    again = load(tmp_path / "out")
    assert torch.equal(again.run(again.example), model.run(model.example))


def test_spoiled_bits_of_codes_are_refused_by_name(model: Model, tmp_path: Path) -> None:
    _quantize_pruned(model, 8, 0.6)
    artifact.save(model, tmp_path / "out")
    stored = load_file(tmp_path / "out" / WEIGHTS)
    stored[f"{TABLE}::bits"][0] ^= 255
    stored[f"{TABLE}::bits"][1] = 255
    _store(tmp_path / "out", stored)
    with pytest.raises(InputError, match=f"{TABLE} is not soundly stored.*codes of"):
        load(tmp_path / "out")


def test_an_artifact_whose_zeros_are_stored_is_still_read(model: Model, tmp_path: Path) -> None:
    """As all were written before there were bitmasks."""
    _prune(model, 0.5)
    artifact.save(model, tmp_path / "out")
    stored = load_file(tmp_path / "out" / WEIGHTS)
    stored = {n: t for n, t in stored.items() if not n.startswith(f"{PRUNED}::")}
    # Products with a mask left negative zeros behind.
    weight = model.module.get_parameter(PRUNED).detach()
    stored[PRUNED] = torch.where(model.masks[PRUNED], weight, -0.0)
    _store(tmp_path / "out", stored)
    again = load(tmp_path / "out")
    assert torch.equal(again.masks[PRUNED], model.masks[PRUNED])
    assert torch.equal(again.run(again.example), model.run(model.example))
    artifact.save(again, tmp_path / "twice")
    twice = load(tmp_path / "twice")
    assert torch.equal(_bits(twice.module.get_parameter(PRUNED)), _bits(stored[PRUNED]))


def _store(out: Path, stored: dict[str, torch.Tensor]) -> None:
    save_file(stored, out / WEIGHTS)
    _sign(out, WEIGHTS)


def _flipped(bits: torch.Tensor) -> torch.Tensor:
    return torch.cat([bits[:1] ^ 1, bits[1:]])


SPOILED_BITS: dict[str, Any] = {
    "its bits set": lambda s: s.update({f"{PRUNED}::values": s[f"{PRUNED}::values"][:-1].clone()}),
    "values of a bitmask": lambda s: s.update({f"{PRUNED}::bits": _flipped(s[f"{PRUNED}::bits"])}),
    "bits of a tensor": lambda s: s.update({f"{PRUNED}::bits": s[f"{PRUNED}::bits"][:-1].clone()}),
    "parts of a bitmask": lambda s: s.pop(f"{PRUNED}::bits"),
    "lacks 1 tensors": lambda s: [s.pop(f"{PRUNED}::{part}") for part in ("bits", "values")],
    "has NaN or Inf": lambda s: s[f"{PRUNED}::values"].fill_(float("nan")),
    "no place for": lambda s: s.update({"model.norm.weight::bits": torch.zeros(2)}),
}


@pytest.mark.parametrize("message", SPOILED_BITS)
def test_spoiled_bits_are_refused(model: Model, tmp_path: Path, message: str) -> None:
    _prune(model, 0.5)
    artifact.save(model, tmp_path / "out")
    stored = load_file(tmp_path / "out" / WEIGHTS)
    SPOILED_BITS[message](stored)
    _store(tmp_path / "out", stored)
    with pytest.raises(InputError, match=message) as caught:
        load(tmp_path / "out")
    assert PRUNED in str(caught.value) or "model.norm.weight" in str(caught.value)
    assert not all(check.ok for check in verify(tmp_path / "out"))


def test_a_name_that_is_no_parameter_is_refused(model: Model, tmp_path: Path) -> None:
    artifact.save(model, tmp_path / "out")
    stored = load_file(tmp_path / "out" / WEIGHTS)
    stored["../x::bits"] = torch.zeros(2**20, dtype=torch.uint8)
    _store(tmp_path / "out", stored)
    for name in ("../x", "model", 7, None):
        _spoil(tmp_path / "out", "structure.json", lambda t, n=name: t.update(masked=[n]))
        with pytest.raises(InputError, match=r"structure\.json does not fit|no place for"):
            load(tmp_path / "out")
