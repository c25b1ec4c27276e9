"""Verbs on bare weight files, checked with numpy and torch readers alone."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from penjing.errors import InputError, UsageError
from penjing.weights import dequantize_file, prune_file, quantize_file

RNG = np.random.default_rng(0)
SHAPES = [(), (1,), (7,), (5, 9), (4, 3, 2, 2), (0, 40), (3, 0), (6, 1), (2, 64)]


def saved(path: Path, shape: tuple[int, ...], dtype: str = "f4") -> np.ndarray:
    array = RNG.normal(size=shape).astype(dtype)
    np.save(path, array)
    return array


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", ["f2", "f4", "f8", ">f4"])
def test_pruning_takes_the_least_and_keeps_the_rest_bit_for_bit(
    tmp_path: Path, shape: tuple[int, ...], dtype: str
) -> None:
    before = saved(tmp_path / "in.npy", shape, dtype)
    report = prune_file(tmp_path / "in.npy", tmp_path / "out.npy", 0.3)
    after = np.load(tmp_path / "out.npy")
    assert (after.dtype, after.shape) == (before.dtype, before.shape)
    count = round(0.3 * before.size)
    wanted = before.copy().reshape(-1)
    wanted[np.argsort(np.abs(wanted), kind="stable")[:count]] = 0
    np.testing.assert_array_equal(after.reshape(-1), wanted)
    assert report["removed"] == count
    assert report["weights"] == before.size
    json.dumps(report, allow_nan=False)


def test_fortran_order_is_the_same_array(tmp_path: Path) -> None:
    before = np.asfortranarray(RNG.normal(size=(6, 8)))
    np.save(tmp_path / "in.npy", before)
    prune_file(tmp_path / "in.npy", tmp_path / "out.npy", "50%")
    after = np.load(tmp_path / "out.npy")
    cut = np.median(np.abs(before))
    np.testing.assert_array_equal(after, np.where(np.abs(before) > cut, before, 0))


def test_zeros_take_little_room_in_a_compressed_npz(tmp_path: Path) -> None:
    before = RNG.normal(size=(64, 128)).astype("f4")
    np.savez(tmp_path / "in.npz", w=before, bias=before[0], names=np.array(["a"]))
    made = {}
    for name, compress in (("plain", False), ("packed", True), ("again", True)):
        out = tmp_path / f"{name}.npz"
        report = prune_file(tmp_path / "in.npz", out, 0.75, compress=compress)
        assert report["size_bytes"]["after"] == out.stat().st_size
        made[name] = out.read_bytes()
        with np.load(out) as found:
            limit = np.quantile(np.abs(before), 0.75)
            np.testing.assert_array_equal(found["w"], np.where(np.abs(before) > limit, before, 0))
            assert found["names"].tolist() == ["a"]
    assert made["packed"] == made["again"]
    assert len(made["packed"]) < 0.4 * len(made["plain"])
    prune_file(tmp_path / "packed.npz", tmp_path / "more.npz", 0.9)
    with np.load(tmp_path / "more.npz") as found:
        assert (found["w"] != 0).sum() == round(0.1 * before.size)
    with pytest.raises(UsageError, match=r"compressed.*\.npz.*next: "):
        prune_file(tmp_path / "in.npz", tmp_path / "x.safetensors", 0.5, compress=True)


def test_blocks_and_the_rows_that_fill_none(tmp_path: Path) -> None:
    np.save(tmp_path / "in.npy", np.array([[4.0, 3, 2, 9, 7], [1, 1, 8, 9, 7], [0.1, 0, 0, 0, 0]]))
    report = prune_file(tmp_path / "in.npy", tmp_path / "out.npy", 0.5, pattern="2x2")
    assert np.load(tmp_path / "out.npy").tolist() == [
        [0, 0, 2, 9, 7], [0, 0, 8, 9, 7], [0.1, 0, 0, 0, 0],
    ]  # fmt: skip
    why = "the last 1 of each row and the last 1 rows fill no block of 2x2 and stay"
    assert report["tensors"][0]["why"] == why


def test_a_pattern_keeps_two_of_four_and_the_tail(tmp_path: Path) -> None:
    np.save(tmp_path / "in.npy", np.array([[4.0, -3, 2, 1, 5, 6]]))
    report = prune_file(tmp_path / "in.npy", tmp_path / "out.npy", pattern="2:4")
    assert np.load(tmp_path / "out.npy").tolist() == [[4, -3, 0, 0, 5, 6]]
    assert report["sparsity"] == pytest.approx(2 / 6)
    assert "last 2" in report["tensors"][0]["why"]


def test_a_file_of_many_keeps_its_biases_and_everything_else(tmp_path: Path) -> None:
    arrays = {
        "w": RNG.normal(size=(4, 8)).astype("f4"),
        "file": RNG.normal(size=(2, 2, 3)),
        "bias": RNG.normal(size=4).astype("f4"),
        "steps": np.array(7),
        "names": np.array(["a", "b"]),
    }
    np.savez(tmp_path / "in.npz", **{k: v for k, v in arrays.items() if k != "file"})
    save_file(
        {"w": arrays["w"], "file": arrays["file"], "bias": arrays["bias"]},
        tmp_path / "in.safetensors",
        {"a": "b"},
    )
    report = prune_file(tmp_path / "in.npz", tmp_path / "out.npz", 0.5)
    with np.load(tmp_path / "out.npz") as found:
        assert set(found.files) == {"w", "bias", "steps", "names"}
        assert int((found["w"] == 0).sum()) == 16
        for name in ("bias", "steps", "names"):
            np.testing.assert_array_equal(found[name], arrays[name])
    assert {s["name"] for s in report["skipped"]} == {"bias", "steps"}
    prune_file(tmp_path / "in.safetensors", tmp_path / "out.safetensors", 0.5)
    prune_file(tmp_path / "in.safetensors", tmp_path / "other.npz", 0.5)
    again = load_file(tmp_path / "out.safetensors")
    assert int((again["file"] == 0).sum()) == 6
    np.testing.assert_array_equal(again["bias"], arrays["bias"])
    with safe_open(tmp_path / "out.safetensors", "np") as file:
        assert file.metadata() == {"a": "b"}
    with np.load(tmp_path / "other.npz") as found:
        np.testing.assert_array_equal(found["file"], again["file"])


def test_state_dicts_keep_dtypes_order_and_ties(tmp_path: Path) -> None:
    weight = torch.randn(8, 8).bfloat16()
    before = {
        "b": torch.randn(8),
        "a": weight,
        "tied": weight,
        "f8": weight.to(torch.float8_e4m3fn),
    }
    torch.save(before, tmp_path / "in.pth")
    prune_file(tmp_path / "in.pth", tmp_path / "out.pth", 0.25)
    after = torch.load(tmp_path / "out.pth", weights_only=True)
    assert list(after) == list(before)
    assert after["a"].dtype == torch.bfloat16
    assert int((after["a"] == 0).sum()) >= 16
    assert after["a"].data_ptr() == after["tied"].data_ptr()
    assert torch.equal(after["f8"].float(), before["f8"].float())


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", ["f2", "f4", "f8"])
@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
@pytest.mark.parametrize(
    ("bits", "group", "symmetric"), [(8, 0, False), (8, 0, True), (3, 4, False)]
)
def test_quantized_and_back(
    tmp_path: Path,
    shape: tuple[int, ...],
    dtype: str,
    suffix: str,
    bits: int,
    group: int,
    symmetric: bool,
) -> None:
    before = saved(tmp_path / "in.npy", shape, dtype)
    stored, back = tmp_path / f"q{suffix}", tmp_path / "back.npy"
    report = quantize_file(
        tmp_path / "in.npy", stored, bits, group=group, symmetric=symmetric, method="rtn"
    )
    dequantize_file(stored, back)
    after = np.load(back)
    assert (after.dtype, after.shape) == (before.dtype, before.shape)
    span = float(np.ptp(np.append(before, 0))) if before.size else 0.0
    step = 2 * span / (2**bits - 2)
    assert float(np.max(np.abs(after - before), initial=0)) <= step * 1.01
    through = tmp_path / "through.npy"
    quantize_file(
        tmp_path / "in.npy", through, bits, group=group, symmetric=symmetric, dequantize=True
    )
    np.testing.assert_array_equal(np.load(through), after)
    quantize_file(stored, through, dequantize=True, overwrite=True)
    np.testing.assert_array_equal(np.load(through), after)
    json.dumps(report, allow_nan=False)


@pytest.mark.parametrize("shape", [(), (7,), (5, 9), (4, 3, 2, 2), (6, 1)])
def test_eight_bits_are_what_the_formula_says_for_any_reader(
    tmp_path: Path, shape: tuple[int, ...]
) -> None:
    before = saved(tmp_path / "in.npy", shape)
    quantize_file(tmp_path / "in.npy", tmp_path / "q.npz", 8)
    dequantize_file(tmp_path / "q.npz", tmp_path / "back.npy")
    with np.load(tmp_path / "q.npz", allow_pickle=False) as q:
        assert (q["codes"].dtype, q["codes"].shape) == (np.uint8, before.shape)
        values = q["scale"] * q["codes"].astype("f4") + q["shift"]
    assert values.shape == before.shape
    np.testing.assert_array_equal(values, np.load(tmp_path / "back.npy"))


def test_four_bits_are_half_a_byte_each(tmp_path: Path) -> None:
    before = saved(tmp_path / "in.npy", (64, 256))
    report = quantize_file(tmp_path / "in.npy", tmp_path / "q.safetensors", 4, group=64)
    q = load_file(tmp_path / "q.safetensors")
    assert q["codes"].shape == (64, 128)
    scale, shift = (np.repeat(q[name], 64, axis=1) for name in ("scale", "shift"))
    codes = np.stack([q["codes"] & 15, q["codes"] >> 4], axis=-1).reshape(64, 256)
    np.testing.assert_allclose(scale * codes + shift, before, atol=float(scale.max()))
    # 4 bits of code, 2 * 32 bits of scale and shift over 64 weights.
    assert report["stored_bits_per_weight"] == pytest.approx(5.0)
    assert report["size_bytes"]["after"] < 64 * 256 * 5 / 8 + 1000
    assert report["size_bytes"]["after"] == (tmp_path / "q.safetensors").stat().st_size


def test_many_tensors_quantized_and_back(tmp_path: Path) -> None:
    before = {
        "a.b": torch.randn(16, 32),
        "a": torch.randn(8, 16).bfloat16(),
        "bias": torch.randn(16),
        "steps": torch.tensor(3),
    }
    torch.save(before, tmp_path / "in.pth")
    quantize_file(tmp_path / "in.pth", tmp_path / "q.safetensors", 8)
    dequantize_file(tmp_path / "q.safetensors", tmp_path / "back.pth")
    after = torch.load(tmp_path / "back.pth", weights_only=True)
    assert {k: (v.dtype, v.shape) for k, v in after.items()} == {
        k: (v.dtype, v.shape) for k, v in before.items()
    }
    assert torch.equal(after["bias"], before["bias"])
    for name in ("a.b", "a"):
        assert (after[name].float() - before[name].float()).abs().max() < 0.04


def test_the_error_grid_beats_rounding(tmp_path: Path) -> None:
    saved(tmp_path / "in.npy", (32, 128))
    errors = [
        quantize_file(tmp_path / "in.npy", tmp_path / f"{m}.npz", 2, method=m)["tensors"][0][
            "relative_error"
        ]
        for m in ("random", "rtn", "gptq")
    ]
    assert errors == sorted(errors, reverse=True)
    assert errors[2] < 0.8 * errors[1]


def test_the_same_bytes_every_time(tmp_path: Path) -> None:
    saved(tmp_path / "in.npy", (8, 40))
    for suffix in (".npz", ".safetensors"):
        files = [tmp_path / f"{k}{suffix}" for k in "ab"]
        for file in files:
            quantize_file(tmp_path / "in.npy", file, 4)
        assert files[0].read_bytes() == files[1].read_bytes()
    for k in "ab":
        prune_file(tmp_path / "in.npy", tmp_path / f"{k}.pth", 0.5)
    assert (tmp_path / "a.pth").read_bytes() == (tmp_path / "b.pth").read_bytes()


def test_options_that_make_no_sense(tmp_path: Path) -> None:
    source = tmp_path / "in.npy"
    saved(source, (4, 4))
    out = tmp_path / "out.npy"
    calls = {
        "no sparsity": lambda: prune_file(source, out),
        "sparsity": lambda: prune_file(source, out, 50),
        "disagree": lambda: prune_file(source, out, 0.4, pattern="2:4"),
        "not a pattern": lambda: prune_file(source, out, pattern="4:2"),
        "criterion of bare weights": lambda: prune_file(source, out, 0.5, criterion="zzz"),
        "others look at data": lambda: prune_file(source, out, 0.5, criterion="wanda"),
        "unknown name in quantizers": lambda: quantize_file(source, out, 8, method="zzz"),
        "no bits": lambda: quantize_file(source, out),
        "bits": lambda: quantize_file(source, out, 16),
        "format of a quantized file": lambda: quantize_file(source, out, 8),
        "format of a weight file": lambda: prune_file(source, tmp_path / "out.txt", 0.5),
    }
    for message, call in calls.items():
        with pytest.raises(UsageError, match=message):
            call()
    assert [p.name for p in tmp_path.iterdir()] == ["in.npy"]


def test_inputs_that_cannot_be_used(tmp_path: Path) -> None:
    good, out = tmp_path / "good.npy", tmp_path / "out.npz"
    saved(good, (4, 16))
    bad = {
        "nan": np.array([[1.0, np.nan]]),
        "inf": np.array([1.0, -np.inf]),
        "ints": np.arange(4),
        "large": np.array([[1e300, 1.0]]),
    }
    for name, array in bad.items():
        np.save(tmp_path / f"{name}.npy", array)
    np.savez(tmp_path / "named.npz", fine=np.ones((2, 2)), culprit=np.array([[np.nan, 1.0]]))
    quantize_file(good, tmp_path / "q.npz", 8)
    before = sorted(p.name for p in tmp_path.iterdir())
    calls = {
        "NaN or infinite": lambda: prune_file(tmp_path / "nan.npy", out, 0.5),
        "tensor weight": lambda: quantize_file(tmp_path / "inf.npy", out, 8),
        "tensor culprit": lambda: quantize_file(tmp_path / "named.npz", out, 8),
        "nothing to prune": lambda: prune_file(tmp_path / "ints.npy", out, 0.5),
        "too large to quantize": lambda: quantize_file(tmp_path / "large.npy", out, 8),
        "no such file": lambda: prune_file(tmp_path / "none.npy", out, 0.5),
        "the output is the input": lambda: prune_file(good, good, 0.5, overwrite=True),
        "the output exists": lambda: prune_file(good, tmp_path / "q.npz", 0.5),
        "folder does not exist": lambda: prune_file(good, tmp_path / "no" / "x.npy", 0.5),
        "quantized already": lambda: quantize_file(tmp_path / "q.npz", out, 8),
        "is quantized": lambda: prune_file(tmp_path / "q.npz", out, 0.5),
        "not quantized": lambda: dequantize_file(good, out),
        "a .npy holds one array": lambda: dequantize_file(_many(tmp_path), tmp_path / "x.npy"),
    }
    for message, call in calls.items():
        with pytest.raises(InputError, match=message):
            call()
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([*before, "many.npz"])


def _many(folder: Path) -> Path:
    torch.save({"a": torch.ones(2, 16), "b": torch.ones(2, 16)}, folder / "m.pth")
    quantize_file(folder / "m.pth", folder / "many.npz", 8)
    (folder / "m.pth").unlink()
    return folder / "many.npz"


@pytest.mark.parametrize(
    "damage",
    [
        {"penjing": '{"tensors": 3}'},
        {"penjing": "{"},
        {"penjing": "[]"},
        {"scale": None},
        {"codes": None},
        {"scale": np.ones((9, 9), "f4")},
        {"codes": np.ones((4, 16), "f4")},
        {"shape": [4, 10**12]},
        {"matrix": [4, 10**12]},
        {"group": 0},
        {"bits": [99]},
        {"dtype": "object"},
    ],
    ids=str,
)
def test_damaged_quantized_files(tmp_path: Path, damage: dict[str, object]) -> None:
    saved(tmp_path / "in.npy", (4, 16))
    quantize_file(tmp_path / "in.npy", tmp_path / "q.npz", 8)
    with np.load(tmp_path / "q.npz") as file:
        arrays = dict(file)
    ((key, value),) = damage.items()
    if key in arrays and value is None:
        del arrays[key]
    elif key in arrays:
        arrays[key] = np.array(value)
    else:
        table = json.loads(str(arrays["penjing"]))
        table["tensors"]["weight"][key] = value
        arrays["penjing"] = np.array(json.dumps(table))
    np.savez(tmp_path / "q.npz", **arrays)
    with pytest.raises(InputError, match=r"damaged|not a whole"):
        dequantize_file(tmp_path / "q.npz", tmp_path / "out.npy")
    assert not (tmp_path / "out.npy").exists()


FULL = """
import resource, sys
from penjing.errors import InputError
from penjing.weights import dequantize_file, prune_file, quantize_file
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
try:
    if sys.argv[3] == "prune":
        prune_file(sys.argv[1], sys.argv[2], 0.5)
    else:
        quantize_file(sys.argv[1], sys.argv[2], 8)
except InputError as error:
    print(error)
    sys.exit(error.exit_status)
"""


@pytest.mark.parametrize(
    ("verb", "suffix"),
    [
        ("prune", ".npy"),
        ("prune", ".npz"),
        ("prune", ".safetensors"),
        ("prune", ".pth"),
        ("quantize", ".npz"),
        ("quantize", ".safetensors"),
    ],
)
def test_a_full_disk_leaves_nothing(tmp_path: Path, verb: str, suffix: str) -> None:
    saved(tmp_path / "in.npy", (512, 512))
    out = tmp_path / f"out{suffix}"
    done = subprocess.run(
        [sys.executable, "-c", FULL, str(tmp_path / "in.npy"), str(out), verb],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1, done.stderr
    assert "cannot write" in done.stdout
    assert done.stdout.count("\n") == 1
    assert [p.name for p in tmp_path.iterdir()] == ["in.npy"]


def test_targets_of_a_file(tmp_path: Path) -> None:
    path, out = tmp_path / "two.npz", tmp_path / "out.npz"
    random = np.random.default_rng(0)
    arrays = {n: random.standard_normal((8, 8)).astype(np.float32) for n in ("a.weight", "b")}
    np.savez(path, **arrays)
    found = prune_file(path, out, 0.5, targets=("a.*",))
    stored = np.load(out)
    assert (stored["a.weight"] == 0).sum() == 32
    assert np.array_equal(stored["b"], arrays["b"])
    assert {"name": "b", "why": "no target"} in found["skipped"]
    with pytest.raises(InputError, match="match no tensor"):
        prune_file(path, out, 0.5, targets=("c",), overwrite=True)
    quantize_file(path, tmp_path / "q.npz", 8, targets=("b",))
    assert np.array_equal(np.load(tmp_path / "q.npz")["a.weight"], arrays["a.weight"])
