"""inspect on a real folder of a tiny network; evaluate's refusals."""

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

import penjing.cli.look as look
from penjing.cli import group
from penjing.inspect import SORTS

transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tokenizers import Tokenizer, models

    folder = tmp_path_factory.mktemp("llama")
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, intermediate_size=48, max_position_embeddings=64,
        tie_word_embeddings=True,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    words = {f"w{i}": i for i in range(63)} | {"<unk>": 63}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", pad_token="<unk>", model_max_length=64
    ).save_pretrained(folder)
    return folder


def test_sorts_are_those_of_inspect() -> None:
    assert look.SORTS == SORTS


def test_inspect_json(llama: Path) -> None:
    arguments = ["inspect", str(llama), "--json", "--length", "16", "--sort", "macs"]
    done = CliRunner().invoke(group, arguments)
    assert done.exit_code == 0, done.stderr
    found = json.loads(done.stdout)
    # embeddings (tied), per block q o k v, gate up down, two norms, and the last norm
    block = 2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48 + 2 * 32
    assert found["totals"]["parameters"] == 64 * 32 + 2 * block + 32
    # products of weights, the head too, and attention: heads * length^2 * 2 * head width
    assert found["totals"]["macs"] == 16 * (2 * (block - 64) + 64 * 32) + 2 * 4 * 16 * 16 * 16
    assert len(found["blocks"]) == 2
    assert found["tied"] == [["model.embed_tokens.weight", "lm_head.weight"]]
    assert found["layers"][0]["macs"] == max(layer["macs"] for layer in found["layers"])
    assert found["totals"]["latency_ms"] > 0


def test_inspect_table(llama: Path) -> None:
    done = CliRunner().invoke(group, ["inspect", str(llama), "--top", "2", "--length", "16"])
    assert done.exit_code == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].split() == ["layer", "kind", "parameters", "bytes", "MACs", "memory", "latency"]
    assert len([line for line in lines if line.startswith("model.")]) == 2
    assert any(line.startswith("total") for line in lines)
    assert "blocks: 2, model.layers.0 ... model.layers.1" in done.stdout


def test_inspect_refuses_a_length_the_network_does_not_have(llama: Path) -> None:
    done = CliRunner().invoke(group, ["inspect", str(llama), "--length", "65"])
    assert done.exit_code == 2
    assert "1 to 64" in done.stderr


def test_inspect_a_weight_file(tmp_path: Path) -> None:
    np.savez(tmp_path / "w.npz", a=np.zeros((3, 5), np.float32), b=np.zeros(7, np.float32))
    done = CliRunner().invoke(group, ["inspect", str(tmp_path / "w.npz"), "--json"])
    assert done.exit_code == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["totals"]["parameters"] == 22
    assert found["totals"]["macs"] is None


def test_weights_with_nan_are_refused_by_name(tmp_path: Path) -> None:
    np.savez(tmp_path / "w.npz", good=np.zeros((2, 2)), bad=np.array([[np.nan, 1.0]]))
    done = CliRunner().invoke(group, ["inspect", str(tmp_path / "w.npz")])
    assert done.exit_code == 1
    assert "bad" in done.stderr


def test_evaluate_wants_data(tmp_path: Path) -> None:
    done = CliRunner().invoke(group, ["evaluate", str(tmp_path)])
    assert done.exit_code == 2
    assert "--data" in done.stderr


def test_inspect_groups(llama: Path) -> None:
    done = CliRunner().invoke(group, ["inspect", str(llama), "--groups", "--json"])
    assert done.exit_code == 0, done.stderr
    found = json.loads(done.stdout)
    units = {one["name"]: (one["units"], one["heads"]) for one in found["groups"]}
    layers = [f"model.layers.{i}" for i in (0, 1)]
    assert units == {f"{n}.self_attn.q_proj.weight": (2, True) for n in layers} | {
        f"{n}.mlp.gate_proj.weight": (48, False) for n in layers
    }
    reads = [m for one in found["groups"] for m in one["members"] if m["reads"]]
    assert {m["name"].split(".")[-2] for m in reads} == {"o_proj", "down_proj"}
    frozen = {(f["name"], f["axis"]): f["reason"] for f in found["frozen"]}
    assert frozen["model.embed_tokens.weight", 0] == "rows of a table"
    done = CliRunner().invoke(group, ["inspect", str(llama), "--groups"])
    assert done.exit_code == 0, done.stderr
    assert "4 groups, each proved" in done.stdout
    assert "stays: " in done.stdout
