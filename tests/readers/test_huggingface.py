from __future__ import annotations

import json
import os
import pickle
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn

import penjing
from penjing.apply import apply
from penjing.errors import InputError
from penjing.readers import huggingface
from penjing.readers._transformers import read_tokenizer
from penjing.recipe import Recipe
from penjing.steps.quantize import Quantize
from penjing.writers import compressed_tensors

TEXT = {"intermediate_size": 24, "vocab_size": 50, "max_position_embeddings": 32}
IMAGE = {"intermediate_size": 24, "image_size": 16, "patch_size": 8, "num_labels": 3}
MODELS: list[tuple[str, str, dict[str, Any]]] = [
    ("BertForSequenceClassification", "classifier", TEXT | {"num_labels": 3}),
    ("RobertaModel", "embedding", TEXT),
    ("DistilBertForSequenceClassification", "classifier", {"dim": 16, "n_layers": 2, "n_heads": 2}),
    ("LlamaForCausalLM", "causal", TEXT | {"num_key_value_heads": 1, "tie_word_embeddings": True}),
    ("Qwen2ForCausalLM", "causal", TEXT | {"num_key_value_heads": 1}),
    ("GPT2LMHeadModel", "causal", {"n_embd": 16, "n_layer": 2, "n_head": 2, "vocab_size": 50}),
    ("ViTForImageClassification", "image", IMAGE),
    ("MixtralForCausalLM", "causal", TEXT | {"num_key_value_heads": 1, "num_local_experts": 2}),
]


@pytest.mark.parametrize(("name", "interface", "options"), MODELS, ids=[m[0] for m in MODELS])
def test_outputs_equal_from_pretrained(
    maker: Callable[..., Path], name: str, interface: str, options: dict[str, Any]
) -> None:
    if name == "GPT2LMHeadModel":
        options = options | {"hidden_size": 16}
    folder = maker(name, **options)
    model = huggingface.read(folder)
    assert model.interface == interface
    reference = getattr(transformers, name).from_pretrained(folder).eval()
    with torch.no_grad():
        ours, theirs = model.run(model.example), reference(**model.example)
    if interface == "embedding":
        torch.testing.assert_close(ours, theirs.last_hidden_state.mean(1), rtol=1e-6, atol=1e-6)
    else:
        assert torch.equal(ours, theirs.logits)
    ours_buffers = dict(model.module.named_buffers())
    theirs_buffers = dict(reference.named_buffers())
    assert ours_buffers.keys() == theirs_buffers.keys()
    assert all(torch.equal(v, theirs_buffers[k]) for k, v in ours_buffers.items())
    assert not model.module.training
    assert {p.dtype for _, p in model.parameters()} == {torch.float32}


def test_tied_embeddings_are_one_tensor(maker: Callable[..., Path]) -> None:
    model = huggingface.read(maker("LlamaForCausalLM", **TEXT, tie_word_embeddings=True))
    assert model.tied() == [("model.embed_tokens.weight", "lm_head.weight")]


def test_the_pooler_is_left_out_and_surplus_is_not(bert: Path) -> None:
    assert any("pooler" in n for n in load_file(bert / "model.safetensors"))
    assert not any("pooler" in n for n, _ in huggingface.read(bert).parameters())


def test_a_prefix_of_a_head_class_is_understood(bert: Path) -> None:
    plain = huggingface.read(bert)
    tensors = load_file(bert / "model.safetensors")
    save_file({f"bert.{k}": v for k, v in tensors.items()}, bert / "model.safetensors")
    prefixed = huggingface.read(bert)
    assert torch.equal(plain.run(plain.example), prefixed.run(plain.example))


@pytest.mark.parametrize("kind", ["cls", "mean"])
def test_pooling_is_read(bert: Path, kind: str) -> None:
    table = [{"type": "sentence_transformers.models.Pooling", "path": "1_Pooling"}]
    (bert / "modules.json").write_text(json.dumps(table))
    (bert / "1_Pooling").mkdir()
    flags = {"cls": "pooling_mode_cls_token", "mean": "pooling_mode_mean_tokens"}
    content = dict.fromkeys(flags.values(), False) | {flags[kind]: True}
    (bert / "1_Pooling/config.json").write_text(json.dumps(content))
    model = huggingface.read(bert)
    batch = {k: v.clone() for k, v in model.example.items()}
    batch["attention_mask"][:, 5:] = 0
    with torch.no_grad():
        hidden = model.module(**batch).last_hidden_state
        wanted = hidden[:, 0] if kind == "cls" else hidden[:, :5].mean(1)
        torch.testing.assert_close(model.run(batch), wanted)


def test_half_precision_and_shards(maker: Callable[..., Path]) -> None:
    folder = maker("LlamaForCausalLM", **TEXT)
    whole = huggingface.read(folder)
    tensors = {k: v.half() for k, v in load_file(folder / "model.safetensors").items()}
    (folder / "model.safetensors").unlink()
    places = {k: f"model-{i % 2}.safetensors" for i, k in enumerate(tensors)}
    for shard in set(places.values()):
        save_file({k: v for k, v in tensors.items() if places[k] == shard}, folder / shard)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": places}))
    for name, value in huggingface.read(folder).parameters():
        assert torch.equal(value, whole.module.get_parameter(name).half().float())
    # The same tensor in a second shard.
    first = next(iter(tensors))
    other = "model-1.safetensors"
    save_file(load_file(folder / other) | {first: tensors[first]}, folder / other)
    with pytest.raises(InputError, match=f"{first} is in two shards"):
        huggingface.read(folder)
    for bad in ("../model-0.safetensors", "gone.safetensors", "/etc/passwd", 3):
        index.write_text(json.dumps({"weight_map": places | {first: bad}}))
        with pytest.raises(InputError, match=r"no such file|no file of its folder"):
            huggingface.read(folder)


def _edit(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


CONFIGS: list[tuple[dict[str, Any], str]] = [
    ({"num_hidden_layers": 10**9}, "num_hidden_layers"),
    ({"num_hidden_layers": -1}, "num_hidden_layers"),
    ({"num_hidden_layers": 3}, r"missing encoder\.layer\.2"),
    ({"num_hidden_layers": 1}, r"no place for.*encoder\.layer\.1"),
    ({"num_hidden_layers": "two"}, "does not describe"),
    ({"hidden_size": [16]}, "does not describe"),
    ({"hidden_size": 18}, "another shape"),
    ({"hidden_size": -4}, "hidden_size"),
    ({"vocab_size": 10**12}, "vocab_size"),
    # 128 GB of embeddings: refused by shape, because building them takes no memory.
    ({"vocab_size": 2 * 10**9}, "another shape"),
    ({"max_position_embeddings": 10**10}, "max_position_embeddings"),
    ({"num_labels": 10**9}, "num_labels"),
    ({"hidden_act": "os.system"}, "does not describe"),
    ({"auto_map": {"AutoModel": "evil--x.Model"}}, "auto_map"),
    ({"nested": {"_target_": "os.system"}}, "_target_"),
    ({"quantization_config": {"bits": 4}}, "already quantized"),
    ({"model_type": "no-such-type"}, "model_type"),
    ({"model_type": ["bert"]}, "model_type"),
    ({"architectures": ["BertForMaskedLM"]}, "architecture"),
    ({"architectures": ["LlamaForCausalLM"]}, "architecture"),
    ({"architectures": "BertModel"}, "architectures"),
]


@pytest.mark.parametrize(("changes", "message"), CONFIGS, ids=[str(c[0])[:40] for c in CONFIGS])
def test_bad_configurations_are_refused_fast(
    bert: Path, changes: dict[str, Any], message: str
) -> None:
    _edit(bert, **changes)
    start = time.perf_counter()
    with pytest.raises(InputError, match=message):
        huggingface.read(bert)
    assert time.perf_counter() - start < 2


@pytest.mark.parametrize("text", ["[" * 200_000, "{", "[]", '"x"', "\xff", "{}"])
def test_config_that_is_no_configuration(bert: Path, text: str) -> None:
    (bert / "config.json").write_text(text, encoding="latin-1")
    with pytest.raises(InputError):
        huggingface.read(bert)


def test_wrong_tensors_are_named(bert: Path) -> None:
    file, name = bert / "model.safetensors", "encoder.layer.1.output.dense.weight"
    good = load_file(file)
    broken: list[tuple[dict[str, torch.Tensor], str]] = [
        ({k: v for k, v in good.items() if k != name}, f"missing {name}"),
        (good | {"extra.weight": torch.ones(2)}, "no place for; got extra.weight"),
        (good | {name: torch.ones(3, 3)}, f"{name} .* another shape"),
        (good | {name: torch.full_like(good[name], float("nan"))}, f"{name} .* NaN"),
        (good | {name: good[name].to(torch.int8)}, f"{name} .* another type"),
        (good | {name: good[name].to(torch.complex64)}, f"{name} .* unusual type"),
    ]
    infinite = good[name].clone()
    infinite[0, 0] = float("-inf")
    broken.append((good | {name: infinite}, f"{name} .* Inf; got 1 of 384"))
    for tensors, message in broken:
        save_file(tensors, file)
        with pytest.raises(InputError, match=message):
            huggingface.read(bert)


def test_a_pickle_needs_the_flag_and_is_read_weights_only(bert: Path, tmp_path: Path) -> None:
    wanted = huggingface.read(bert)
    torch.save(load_file(bert / "model.safetensors"), bert / "pytorch_model.bin")
    (bert / "model.safetensors").unlink()
    with pytest.raises(InputError, match="--allow-pickle"):
        huggingface.read(bert)
    model = huggingface.read(bert, allow_pickle=True)
    assert torch.equal(model.run(model.example), wanted.run(model.example))
    mark = tmp_path / "executed"

    class Evil:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(mark),)

    (bert / "pytorch_model.bin").write_bytes(pickle.dumps({"w": Evil()}))
    with pytest.raises(InputError, match="weights-only"):
        huggingface.read(bert, allow_pickle=True)
    assert not mark.exists()


def test_links_out_of_the_folder_and_pipes_are_refused(bert: Path, tmp_path: Path) -> None:
    file = bert / "model.safetensors"
    file.rename(tmp_path / "elsewhere.safetensors")
    file.symlink_to(tmp_path / "elsewhere.safetensors")
    with pytest.raises(InputError, match="leaves its folder"):
        huggingface.read(bert)
    file.unlink()
    os.mkfifo(file)
    with pytest.raises(InputError, match="not a regular file"):
        huggingface.read(bert)


def test_the_hub_cache_layout_is_accepted(bert: Path, tmp_path: Path) -> None:
    snapshot, blobs = tmp_path / "hub/snapshots/abc", tmp_path / "hub/blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, name in enumerate(("config.json", "model.safetensors")):
        (bert / name).rename(blobs / str(number))
        (snapshot / name).symlink_to(f"../../blobs/{number}")
    assert huggingface.read(snapshot).interface == "embedding"


def test_preprocessing_equals_transformers(maker: Callable[..., Path]) -> None:
    folder = maker("ViTForImageClassification", **IMAGE)
    settings = {
        "image_processor_type": "ViTImageProcessor", "do_resize": True, "do_rescale": True,
        "do_normalize": True, "size": {"height": 16, "width": 16}, "resample": 2,
        "rescale_factor": 1 / 255, "image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.25, 0.3],
    }  # fmt: skip
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    pixels = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    model = huggingface.read(folder)
    small = Image.fromarray(pixels).resize((16, 16), Image.Resampling.BILINEAR)
    wanted = (np.asarray(small) / 255 - [0.4, 0.5, 0.6]) / [0.2, 0.25, 0.3]
    got = model.preprocess(Image.fromarray(pixels))
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, wanted.transpose(2, 0, 1), atol=1e-5)
    assert model.example["pixel_values"].shape == (2, 3, 16, 16)


def test_the_tokenizer_is_the_file_s(tmp_path: Path) -> None:
    """For Qwen2 transformers has a splitter of its own, whatever the file says."""
    words = {"<unk>": 0, "hello": 1, "Hello": 2, "world": 3, ",": 4, "it": 5, "'": 6, "s": 7}
    own = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    own.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    own.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "config.json").write_text('{"model_type": "qwen2"}')
    (tmp_path / "tokenizer_config.json").write_text(
        '{"tokenizer_class": "Qwen2Tokenizer", "unk_token": "<unk>"}'
    )
    found = read_tokenizer(tmp_path)
    for text in ("Hello  world", "hello, world", "it's  hello"):
        assert found(text).input_ids == own.encode(text).ids


def test_matrices_that_a_checkpoint_stores_transposed(tmp_path: Path) -> None:
    """GPT-2's, as linear layers that every step handles; square ones too."""
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=40, n_embd=32, n_layer=2, n_head=2, n_positions=16, n_inner=48
    )
    plain = transformers.GPT2LMHeadModel(config).eval()
    plain.save_pretrained(tmp_path / "gpt2")
    model = penjing.load(tmp_path / "gpt2")
    ids = torch.randint(0, 40, (3, 12))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    with torch.no_grad():
        torch.testing.assert_close(model.run(batch), plain(**batch).logits, atol=1e-5, rtol=0)
    kept = model.module.get_parameter("transformer.h.0.attn.c_attn.weight")
    assert torch.equal(kept, plain.transformer.h[0].attn.c_attn.weight.T)
    made = apply(model, Recipe((Quantize(bits=4, group=16),)), [batch]).model
    layers = [n for n, m in model.module.named_modules() if isinstance(m, nn.Linear)]
    assert len(made.planes) == len(layers) == 9  # four a block, and the output
    penjing.save(made, tmp_path / "four")
    again = penjing.load(tmp_path / "four")
    assert torch.equal(again.run(batch), made.run(batch))
    (line, *_) = compressed_tensors.check(made)
    assert "transposed" in line
