"""Single techniques on bare weight files, and usage that is refused first."""

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from penjing.cli import group

SHRINK = ("shrink", "{w}", "--ratio", "0.5", "--data", "{w}", "-o", "{d}/o")


def invoke(*arguments: object) -> tuple[int, str, str]:
    done = CliRunner().invoke(group, [str(a) for a in arguments])
    return done.exit_code, done.stdout, done.stderr


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    path = tmp_path / "params.npy"
    np.save(path, np.random.default_rng(0).normal(size=(32, 64)).astype(np.float32))
    return path


def test_prune_a_weight_file(weights: Path, tmp_path: Path) -> None:
    status, out, error = invoke("prune", weights, "--sparsity", "50%", "-o", tmp_path / "o.npy")
    assert (status, error) == (0, "")
    assert "removed" in out
    before, after = np.load(weights), np.load(tmp_path / "o.npy")
    limit = np.median(np.abs(before))
    np.testing.assert_array_equal(after, np.where(np.abs(before) > limit, before, 0))


def test_prune_a_weight_file_by_pattern(weights: Path, tmp_path: Path) -> None:
    assert invoke("prune", weights, "--pattern", "2:4", "-o", tmp_path / "o.npy")[0] == 0
    kept = np.load(tmp_path / "o.npy").reshape(-1, 4) != 0
    assert (kept.sum(1) == 2).all()


def test_prune_a_weight_file_in_blocks(weights: Path, tmp_path: Path) -> None:
    options = ("--sparsity", 0.5, "--pattern", "2x4", "-o", tmp_path / "o.npy")
    assert invoke("prune", weights, *options)[0] == 0
    kept = np.load(tmp_path / "o.npy") != 0
    rows, columns = kept.shape[0] // 2, kept.shape[1] // 4
    whole = kept[: 2 * rows, : 4 * columns].reshape(rows, 2, columns, 4).swapaxes(1, 2)
    stay = whole.reshape(rows * columns, -1)
    assert (stay.all(1) | ~stay.any(1)).all()
    assert (~stay.any(1)).sum() == round(0.5 * len(stay))


def test_quantize_a_weight_file(weights: Path, tmp_path: Path) -> None:
    output = tmp_path / "o.npz"
    status, out, _ = invoke("quantize", weights, "--bits", 8, "-o", output, "--json")
    assert status == 0
    assert json.loads(out)["output"] == str(output)
    with np.load(output) as stored:
        assert any(stored[name].dtype == np.uint8 for name in stored.files)


def test_quantize_and_dequantize(weights: Path, tmp_path: Path) -> None:
    output = tmp_path / "o.npy"
    assert invoke("quantize", weights, "--bits", 4, "--dequantize", "-o", output)[0] == 0
    before, after = np.load(weights), np.load(output)
    assert after.dtype == np.float32
    assert all(len(np.unique(row)) <= 16 for row in after)
    # Round to nearest is at most half a step away, at 15 steps a row.
    step = (np.maximum(before.max(1), 0) - np.minimum(before.min(1), 0)) / 15
    assert (np.abs(after - before).max(1) <= step * 0.51 + 1e-6).all()


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        (("prune", "{w}", "-o", "{d}/o.npy"), "--sparsity 0.5 or --pattern"),
        (
            ("prune", "{w}", "--sparsity", "0.5", "--pattern", "2:4", "-o", "{d}/o.npy"),
            "one of them",
        ),
        (("prune", "{w}", "--pattern", "1x4", "-o", "{d}/o.npy"), "1x4 with --sparsity"),
        (("prune", "{w}", "--pattern", "1xq", "-o", "{d}/o.npy"), "N:M such as 2:4"),
        (
            ("prune", "{w}", "--sparsity", "0.5", "--pattern", "1x4x", "-o", "{d}/o.npy"),
            "not a pattern",
        ),
        (
            ("prune", "{w}", "--sparsity", "0.5", "--compress", "-o", "{d}/o.safetensors"),
            "allowed: .npz",
        ),
        (
            ("prune", "{d}", "--sparsity", "0.5", "--compress", "-o", "{d}/o"),
            "without its zeros anyway",
        ),
        (("prune", "{w}", "--sparsity", "1.5", "-o", "{d}/o.npy"), "0 <= sparsity < 1"),
        (("prune", "{w}", "--sparsity", "0.5", "-o", "{d}/folder"), ".safetensors"),
        (("quantize", "{w}", "--codes", "additive", "--bits", "2", "-o", "{d}/o.npy"), "integer"),
        (("quantize", "{w}", "--codes", "trellis", "--bits", "2", "-o", "{d}/o.npy"), "integer"),
        (("quantize", "{w}", "--codes", "trellis", "--bits", "5", "-o", "{d}/o.npy"), "2, 3 or 4"),
        (("quantize", "{w}", "--method", "awq", "-o", "{d}/o.npy"), "clip"),
        (("quantize", "{w}", "--rotate", "-o", "{d}/o.npy"), "not rotated"),
        (("quantize", "{w}", "--refine", "64", "-o", "{d}/o.npy"), "--refine is for networks"),
        (("quantize", "{w}", "--observer", "mse", "-o", "{d}/o.npy"), "--observer is for networks"),
        (("quantize", "{d}", "--observer", "mse", "-o", "{d}/o"), "--activations 8 and --data"),
        (("quantize", "{d}", "--mixed", "-o", "{d}/o"), "with --data, whole --bits of integers"),
        (("quantize", "{w}", "--mixed", "-o", "{d}/o.npy"), "--mixed is for networks"),
        (("quantize", "{d}", "--observer", "none", "-o", "{d}/o"), "auto, entropy, minmax"),
        (
            ("quantize", "{w}", "--data", "{w}", "--to", "onnx", "-o", "{d}/o.npz"),
            "--data, --to are for networks",
        ),
        (("quantize", "{w}", "--embeddings", "8", "-o", "{d}/o.npz"), "--embeddings is for"),
        (
            ("prune", "{w}", "--sparsity", "0.5", "--data", "{w}", "-o", "{d}/o.npy"),
            "--data is for networks; got",
        ),
        (("quantize", "{d}", "--rotate", "--to", "gguf", "-o", "{d}/o"), "onnx, openvino"),
        (
            ("quantize", "{d}", "--bits", "3", "--to", "onnx,executorch", "-o", "{d}/o"),
            "groups of a multiple of 32",
        ),
        (
            ("quantize", "{d}", "--bits", "2", "--codes", "trellis", "--to", "onnx", "-o", "{d}/o"),
            "no export",
        ),
        (("quantize", "{d}", "--dequantize", "-o", "{d}/o"), "bare weight files"),
        (("quantize", "{w}", "--bits", "9", "-o", "{d}/o.npy"), "1<=x<=8"),
        (("shrink", "{w}", "--ratio", "0", "--data", "{w}", "-o", "{d}/o"), "0 < ratio < 1"),
        (("shrink", "{w}", "--ratio", "0.5", "-o", "{d}/o"), "--data"),
        (
            (*SHRINK, "--ranking", "global"),
            "--of parameters, macs or latency",
        ),
        (
            (*SHRINK, "--criterion", "x"),
            "gram, activation, bn-scale, fisher, fpgm, l2, taylor, magnitude, random, wanda",
        ),
        (("cut", "{w}", "--data", "{w}", "-o", "{d}/o"), "either --layers"),
        (
            ("prune", "{w}", "--sparsity", "0.5", "--learn", "gates", "-o", "{d}/o.npy"),
            "--learn is for networks",
        ),
        (
            ("prune", "{d}", "--pattern", "2:4", "--learn", "gates", "-o", "{d}/o"),
            "--pattern with --learn",
        ),
        (
            ("cut", "{w}", "--layers", "1", "--weights-lr", "1e-4", "--data", "{w}", "-o", "{d}/o"),
            "--weights-lr goes with --learn",
        ),
        (
            ("shrink", "{w}", "--ratio", "0.5", "--learn", "l9", "--data", "{w}", "-o", "{d}/o"),
            "gates, growing, hard-concrete, l1, l2, lasso",
        ),
        (("cut", "{w}", "--layers", "1", "--data", "{w}", "-o", "{d}/o"), "cut is for networks"),
        (("cut", "{w}", "--layers", "1", "--patch", "x", "--data", "{w}", "-o", "{d}/o"), "linear"),
    ],
)
def test_usage(arguments: tuple[str, ...], hint: str, weights: Path, tmp_path: Path) -> None:
    filled = [a.format(w=weights, d=tmp_path) for a in arguments]
    status, out, error = invoke(*filled)
    assert (status, out) == (2, "")
    assert hint in error
    assert error.count("\n") == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["params.npy"]


def test_a_recipe_that_is_not_there(tmp_path: Path) -> None:
    status, _, error = invoke("apply", tmp_path, "/no/recipe.toml", "-o", tmp_path / "o")
    assert status == 1
    assert "no such recipe" in error


def test_what_is_learned_is_in_the_artifact(tmp_path: Path) -> None:
    """A network, its data, and the recipe that was made of the options."""
    import transformers

    config = transformers.BertConfig(
        vocab_size=40, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=64, max_position_embeddings=32,
    )  # fmt: skip
    transformers.BertModel(config, add_pooling_layer=False).save_pretrained(tmp_path / "net")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{i}" for i in range(35))]
    (tmp_path / "net" / "vocab.txt").write_text("\n".join(words))
    transformers.BertTokenizer(str(tmp_path / "net" / "vocab.txt")).save_pretrained(
        tmp_path / "net"
    )
    lines = [json.dumps({"text": " ".join(f"w{(i * j) % 35}" for j in range(9))}) for i in range(9)]
    data = tmp_path / "data.jsonl"
    data.write_text("\n".join(lines))
    status, out, error = invoke(
        "shrink", tmp_path / "net", "--ratio", "25%", "--of", "parameters", "--learn", "lasso",
        "--steps", 3, "--weights-lr", "1e-4", "--data", data, "-o", tmp_path / "out", "--json",
    )  # fmt: skip
    assert status == 0, error
    found = json.loads(out)
    gone = 1 - found["parameters"] / found["parameters_before"]
    assert abs(gone - 0.25) < 0.01
    recipe = (tmp_path / "out" / "recipe.toml").read_text()
    assert 'do = "constrain"' in recipe
    assert 'method = "lasso"' in recipe
    assert 'criterion = "learned"' in recipe


def test_the_choices_of_cut_are_those_of_the_step() -> None:
    from penjing.cli.shape import cut
    from penjing.steps.cut import CRITERIA, OF, PARTS, PATCHES

    shown = {p.name: tuple(getattr(p.type, "choices", ())) for p in cut.params}
    assert (shown["criterion"], shown["of"], shown["patch"]) == (CRITERIA, OF, PATCHES)
    assert shown["part"] == (*PARTS, "any")
