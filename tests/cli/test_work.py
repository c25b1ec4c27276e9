"""A technique on a network from the command line: checks, work, artifact."""

import fcntl
import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from penjing.cli import group

transformers = pytest.importorskip("transformers")
pytest.importorskip("penjing.api")


@pytest.fixture
def bert(tmp_path: Path) -> Path:
    folder = tmp_path / "bert"
    config = transformers.BertConfig(
        vocab_size=30, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=64, max_position_embeddings=32,
    )  # fmt: skip
    transformers.BertModel(config, add_pooling_layer=False).save_pretrained(folder)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghijklmnopqrstuvwxy"]
    (folder / "vocab.txt").write_text("\n".join(words))
    transformers.BertTokenizer(str(folder / "vocab.txt"), model_max_length=32).save_pretrained(
        folder
    )
    return folder


def test_prune_writes_an_artifact_that_loads(bert: Path, tmp_path: Path) -> None:
    from penjing.load import load

    output = tmp_path / "pruned"
    arguments = ["prune", str(bert), "--sparsity", "0.5", "-o", str(output), "--json"]
    done = CliRunner().invoke(group, arguments)
    assert done.exit_code == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["size_bytes"] == sum(f.stat().st_size for f in output.rglob("*") if f.is_file())
    weight = load(output).module.get_parameter("encoder.layer.0.output.dense.weight")
    assert float((weight == 0).float().mean()) == pytest.approx(0.5, abs=0.01)
    assert {p.name for p in tmp_path.iterdir()} == {"bert", "pruned"}  # no journal left


def test_prune_says_what_it_gains_and_what_not(bert: Path, tmp_path: Path) -> None:
    from safetensors.numpy import load_file

    sizes = []
    for number, (share, block) in enumerate((("0.5", "2x4"), ("0.9", "24x8"), ("0", "1x1"))):
        output = tmp_path / str(number)
        arguments = ["prune", str(bert), "--sparsity", share, "--pattern", block, "-o", str(output)]
        done = CliRunner().invoke(group, arguments)
        assert done.exit_code == 0, done.stderr
        assert "no runtime here skips zeros" in done.stderr
        stored = load_file(output / "weights" / "model-00001.safetensors")
        size = sum(array.nbytes for array in stored.values())
        assert f"take {size / 1e3:.1f} KB" in done.stderr
        sizes.append(size)
        # Of 32 or 64 rows some fill no block of 24.
        assert ("asked 90.0%" in done.stderr) is (block == "24x8")
    assert sizes[0] < 0.8 * sizes[2]


def test_tables_that_stay_in_floats_are_named(bert: Path, tmp_path: Path) -> None:
    arguments = ["quantize", str(bert), "--bits", "8", "--embeddings", "4", "--method", "rtn"]
    done = CliRunner().invoke(group, [*arguments, "-o", str(tmp_path / "out")])
    assert done.exit_code == 0, done.stderr
    assert "tables of under 16,384 numbers stay in floats: embeddings.word_emb" in done.stderr
    arguments = ["quantize", str(bert), "--bits", "8", "--method", "rtn"]
    done = CliRunner().invoke(group, [*arguments, "-o", str(tmp_path / "floats")])
    assert "tables stay in floats" in done.stderr
    assert "of the weights (embeddings.word_emb" in done.stderr
    assert "size of the folder" in done.stdout
    assert "tensors alone" in done.stdout


def test_bits_by_layer_in_no_more_bytes(bert: Path, tmp_path: Path) -> None:
    from penjing.load import load

    data = tmp_path / "texts.jsonl"
    letters = "abcdefghijklmnopqrstuvwxy"
    texts = [" ".join(letters[i % 25 : i % 25 + 6][::-1] + letters[i % 7]) for i in range(40)]
    data.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    stored = {}
    for name in ("--mixed", ""):
        output = tmp_path / f"out{name}"
        arguments = ["quantize", str(bert), "--bits", "3", "--group", "16", "--scale-bits", "16"]
        arguments += [*name.split(), "--data", str(data), "-o", str(output)]
        done = CliRunner().invoke(group, arguments)
        assert done.exit_code == 0, done.stderr
        stored[name] = sum(planes.stored_bytes for planes in load(output).planes.values())
        assert ("bits by layer: " in done.stderr) is bool(name)
    assert stored["--mixed"] <= stored[""]


def test_a_target_that_cannot_be_is_refused_before_the_work(tmp_path: Path) -> None:
    folder = tmp_path / "llama"
    config = transformers.LlamaConfig(
        vocab_size=40, hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, intermediate_size=32, max_position_embeddings=64,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    for target, why in (("openvino", "a decoder with a KV cache"), ("gguf", "GGUF")):
        arguments = ["quantize", str(folder), "--bits", "4", "--method", "rtn", "--to", target]
        done = CliRunner().invoke(group, [*arguments, "-o", str(tmp_path / "out")])
        assert done.exit_code == 2
        assert f"--to {target} cannot express" in done.stderr
        assert why in done.stderr
        assert [p.name for p in tmp_path.iterdir()] == ["llama"]


def test_heads_that_onnxruntime_cannot_keep_in_integers_are_refused_before_the_work(
    tmp_path: Path,
) -> None:
    config = transformers.LlamaConfig(
        vocab_size=48, hidden_size=48, intermediate_size=48, num_hidden_layers=1,
        num_attention_heads=4, num_key_value_heads=2,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "llama")
    # Data that no network could read: it is not looked at.
    (tmp_path / "d.jsonl").write_text("not JSON")
    given = ["--data", f"{tmp_path / 'd.jsonl'}", "-o", f"{tmp_path / 'o'}"]
    made = CliRunner().invoke(
        group, ["quantize", f"{tmp_path / 'llama'}", "--kv-cache", "8", "--to", "onnx", *given]
    )
    assert made.exit_code == 2
    assert "heads of 12 at model.layers.0.self_attn" in made.stderr


@pytest.mark.parametrize(
    ("group_size", "target", "allowed"),
    [
        ("20", "onnx", "multiples of 16"),
        ("20", "onnx,openvino", "multiples of 16"),
        ("20", "compressed-tensors", "what divides the inputs"),
        ("40", "onnx", None),  # of 32 inputs it is the whole row
        ("16", "onnx", None),
        ("20", "openvino", None),
    ],
)
def test_groups_that_an_export_cannot_hold_are_refused_before_the_work(
    group_size: str, target: str, allowed: str | None, bert: Path, tmp_path: Path
) -> None:
    # Data that no network could read: what is refused before the work does not look at it.
    (tmp_path / "d.jsonl").write_text("not JSON")
    arguments = ["quantize", str(bert), "--bits", "4", "--group", group_size, "--to", target]
    arguments += ["--targets", "*query", "--data", str(tmp_path / "d.jsonl")]
    done = CliRunner().invoke(group, [*arguments, "-o", str(tmp_path / "out")])
    if allowed is None:
        assert done.exit_code == 1
        assert "d.jsonl" in done.stderr
        return
    assert done.exit_code == 2
    assert "got 20 of 32 inputs at encoder.layer.0.attention.self.query" in done.stderr
    assert allowed in done.stderr
    assert {p.name for p in tmp_path.iterdir()} == {"bert", "d.jsonl"}


def test_a_network_in_floats_is_quantized_for_compressed_tensors(
    bert: Path, tmp_path: Path
) -> None:
    arguments = ["quantize", str(bert), "--bits", "4", "--group", "16"]
    more = ["--to", "compressed-tensors", "-o", str(tmp_path / "out")]
    done = CliRunner().invoke(group, [*arguments, *more])
    assert done.exit_code == 0, done.stderr
    config = json.loads((tmp_path / "out/compressed-tensors/config.json").read_text())
    (found,) = config["quantization_config"]["config_groups"].values()
    assert found["weights"]["group_size"] == 16


def test_cut_says_what_went(bert: Path, tmp_path: Path) -> None:
    data = tmp_path / "texts.jsonl"
    lines = (json.dumps({"text": " ".join("abcdefghij"[i : i + 5])}) for i in range(6))
    data.write_text("\n".join(lines))
    arguments = ["cut", str(bert), "--layers", "1", "--data", str(data), "--patch", "none"]
    done = CliRunner().invoke(group, [*arguments, "-o", str(tmp_path / "cut"), "--json"])
    assert done.exit_code == 0, done.stderr
    found = json.loads(done.stdout)
    block = 4 * (32 * 32 + 32) + 2 * 32 * 64 + 64 + 32 + 4 * 32
    assert found["parameters_before"] - found["parameters"] == block


def test_cut_says_where_whole_blocks_are_more_than_was_asked(bert: Path, tmp_path: Path) -> None:
    data = tmp_path / "texts.jsonl"
    lines = (json.dumps({"text": " ".join("abcdefghij"[i : i + 5])}) for i in range(6))
    data.write_text("\n".join(lines))
    for number, (ratio, part, said) in enumerate(
        (("1%", "block", True), ("50%", "block", False), ("1%", "mlp", True))
    ):
        arguments = ["cut", str(bert), "--ratio", ratio, "--part", part, "--patch", "none"]
        more = ["--data", str(data), "-o", str(tmp_path / str(number))]
        done = CliRunner().invoke(group, [*arguments, *more])
        assert done.exit_code == 0, done.stderr
        assert ("1 of 2 blocks, 50.0%, were cut or lost a part" in done.stderr) is said


def test_prune_says_what_is_left_without_any_connection(bert: Path, tmp_path: Path) -> None:
    from penjing.load import load

    arguments = ["prune", str(bert), "--sparsity", "0.98", "-o", str(tmp_path / "out")]
    done = CliRunner().invoke(group, arguments)
    assert done.exit_code == 0, done.stderr
    module = load(tmp_path / "out").module
    silent = sum(
        int((p == 0).all(1).sum()) for n, p in module.named_parameters()
        if n.startswith("encoder") and p.ndim == 2
    )  # fmt: skip
    assert silent
    assert f"{silent} outputs have no connection left, in " in done.stderr
    done = CliRunner().invoke(group, [*arguments[:3], "0", "-o", str(tmp_path / "same")])
    assert done.exit_code == 0, done.stderr
    assert "--sparsity 0 removes nothing" in done.stderr
    assert "no connection left" not in done.stderr


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        (["cut", "--layers", "1", "--part", "mlp", "--patch", "fused"], "a patch of part mlp"),
        (["cut", "--layers", "1", "--part", "any", "--criterion", "angular"], "of part any"),
        (["cut", "--layers", "1", "--train", "5", "--patch", "none"], "train, of patches"),
        (["prune", "--sparsity", "0.5", "--ranking", "global", "--criterion", "wanda"], "by wanda"),
        (["prune", "--sparsity", "0.5", "--pattern", "0x4"], "pattern"),
        (["shrink", "--ratio", "0.5", "--learn", "gates", "--of", "latency"], "is learned"),
        (["quantize", "--bits", "8", "--method", "nothing"], "nothing"),
        (["recover", "--lr", "-1"], "lr"),
    ],
)
def test_what_the_options_alone_decide_is_refused_before_the_network_is_read(
    arguments: list[str], hint: str, tmp_path: Path
) -> None:
    """A folder that no reader takes would be refused otherwise."""
    (tmp_path / "data.jsonl").write_text('{"text": "a b"}\n')
    (tmp_path / "empty").mkdir()
    more = [str(tmp_path / "empty"), "--data", str(tmp_path / "data.jsonl")]
    done = CliRunner().invoke(group, [*arguments, *more, "-o", str(tmp_path / "out")])
    assert done.exit_code == 2, done.stderr
    assert hint in done.stderr
    assert "empty" not in done.stderr


def test_an_empty_data_file(bert: Path, tmp_path: Path) -> None:
    data = tmp_path / "empty.jsonl"
    data.write_text("")
    arguments = ["cut", str(bert), "--layers", "1", "--data", str(data)]
    done = CliRunner().invoke(group, [*arguments, "-o", str(tmp_path / "cut")])
    assert done.exit_code == 1
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "cut").exists()
    assert not (tmp_path / "cut.journal").exists()


def test_a_length_that_the_network_does_not_take_is_not_measured(
    bert: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    arguments = ["quantize", str(bert), "--bits", "8", "--to", "onnx", "-o", str(output)]
    done = CliRunner().invoke(group, arguments)
    assert done.exit_code == 0, done.stderr
    done = CliRunner().invoke(group, ["measure", str(output), "--length", "33"])
    assert done.exit_code == 2
    assert "got 33 tokens; allowed: up to 32" in done.stderr
    assert done.stderr.count("\n") == 1
    # Without a length the usual 128 become those 32.
    done = CliRunner().invoke(group, ["measure", str(output), "--threads", "1", "--json"])
    assert done.exit_code == 0, done.stderr
    assert json.loads(done.stdout)["latency_ms"]["length"] == 32


def test_from_a_model_to_a_measured_artifact(bert: Path, tmp_path: Path) -> None:
    texts, output = tmp_path / "texts.jsonl", tmp_path / "small"
    words = "abcdefghijklmnopqrstuvwxy"
    lines = (json.dumps({"text": " ".join(words[i : i + 5]), "label": i % 2}) for i in range(12))
    texts.write_text("\n".join(lines))

    def run(*arguments: object) -> dict[str, object]:
        done = CliRunner().invoke(group, [*(str(a) for a in arguments), "--json"])
        assert done.exit_code == 0, done.stderr
        return dict(json.loads(done.stdout))

    run("quantize", bert, "--bits", 8, "--data", texts, "--length", 16, "-o", output)
    assert set(run("export", output, "--to", "onnx")["parity"]) == {"onnx"}
    assert run("verify", output)["ok"] is True
    measured = run("measure", output, "--threads", 1, "--length", 16, "--data", texts)
    assert measured["size_bytes"] > 0
    direct = run("evaluate", output, "--data", texts, "--length", 16)
    assert measured["quality"] == pytest.approx(direct["value"], abs=0.05)

    # One flipped byte in the weights is found.
    weights = next(output.rglob("*.safetensors"))
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    done = CliRunner().invoke(group, ["verify", str(output)])
    assert done.exit_code == 1
    assert "Traceback" not in done.output


def test_what_a_step_cannot_handle_is_named(tmp_path: Path) -> None:
    """Recurrent layers are neither pruned nor quantized, but their hidden units go."""
    (tmp_path / "net.py").write_text(
        "import torch\n"
        "class Net(torch.nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.cells = torch.nn.LSTM(8, 32, batch_first=True)\n"
        "        self.head = torch.nn.Linear(32, 4)\n"
        "    def forward(self, x):\n"
        "        return self.head(self.cells(x)[0][:, -1])\n"
        "def make():\n"
        "    torch.manual_seed(0)\n"
        "    return Net()\n"
        "def example():\n"
        "    return torch.zeros(1, 5, 8)\n"
    )
    data = tmp_path / "data.npz"
    np.savez(data, x0=np.random.default_rng(0).normal(size=(16, 5, 8)).astype(np.float32))
    found = {}
    for verb, options in (("prune", ["--sparsity", "0.5"]), ("quantize", []),
                          ("shrink", ["--ratio", "0.5"])):  # fmt: skip
        arguments = [verb, f"{tmp_path / 'net.py'}:make", "--weights", "own", *options, "--json"]
        arguments += ["--data", str(data), "-o", str(tmp_path / verb)]
        done = CliRunner().invoke(group, arguments)
        assert done.exit_code == 0, done.stderr
        said = [line for line in done.stderr.splitlines() if "left as they are" in line]
        # 4 gates: (8 + 32) * 32 * 4.
        line = f"{verb} cannot handle their kind: cells (LSTM, 5,120)"
        assert [li.endswith(line) for li in said] == [True] * (verb != "shrink")
        found[verb] = json.loads(done.stdout)
    # 16 of 32 units: 4 * 16 * (8 + 16 + 2) in the cells, 4 * 17 in the head.
    assert found["shrink"]["parameters"] == 4 * 16 * 26 + 4 * 17


def test_shrink_says_what_it_reached(bert: Path, tmp_path: Path) -> None:
    data = tmp_path / "texts.jsonl"
    lines = (json.dumps({"text": " ".join("abcdefghij"[i : i + 5])}) for i in range(6))
    data.write_text("\n".join(lines))
    for ratio, said in (("0.99", True), ("0.5", False)):
        arguments = ["shrink", str(bert), "--ratio", ratio, "--data", str(data)]
        done = CliRunner().invoke(group, [*arguments, "-o", str(tmp_path / ratio), "--json"])
        assert done.exit_code == 0, done.stderr
        notes = [li for li in done.stderr.splitlines() if "were removed, asked" in li]
        assert bool(notes) is said
        if said:
            # A block keeps 8 of 64 hidden units and, of 32 inputs, one of two heads: 24 of 96.
            assert "75.0% of the units were removed, asked 99.0%" in notes[0]
        assert "left whole" not in done.stderr


def test_blocks_that_lost_nothing_are_named() -> None:
    import copy

    import torch

    from penjing.cli.work import removed
    from penjing.model import Model, Source

    layers = torch.nn.Sequential(*(torch.nn.Sequential(torch.nn.Linear(8, 8)) for _ in range(3)))
    before = Model(
        layers, "tensor", {"x": torch.zeros(1, 8)}, Source("test", "", ""), ("0", "1", "2")
    )
    after = copy.copy(before)
    after.structure = [
        {"kind": "slice", "path": f"{i}.0", "slices": [[f"{i}.0.weight", 1, [0, 1]]]}
        for i in (0, 2)
    ]
    assert list(removed(0.75, before, after)) == [
        "blocks left whole, nothing in them could be removed safely: 1"
    ]
    after.structure = []
    assert next(removed(0.75, before, after)).startswith("nothing was removed: ")


def test_a_refused_run_leaves_the_journal_of_another(bert: Path, tmp_path: Path) -> None:
    journal = tmp_path / "out.journal"
    journal.mkdir()
    arguments = ["prune", str(bert), "--sparsity", "0.5", "-o", str(tmp_path / "out")]
    with open(journal / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        done = CliRunner().invoke(group, arguments)
        assert done.exit_code == 1
        assert "another run" in done.stderr
        assert (journal / "lock").exists()
    assert CliRunner().invoke(group, arguments).exit_code == 0
    assert not journal.exists()
