"""The micro-benchmark runs real kernels; the formulas against hand-computed figures."""

import time
from pathlib import Path

import numpy as np
import pytest

from penjing.errors import UsageError
from penjing.fit import chains
from penjing.fit.preflight import Speed, formats, machine, predict
from penjing.fit.space import FORMATS
from penjing.runtimes import _profile

openvino_here = True
try:
    import openvino  # noqa: F401
except ImportError:
    openvino_here = False


def test_the_machine_is_described(tmp_path: Path) -> None:
    found = machine(tmp_path)
    assert found.cores >= 1
    assert 0 < found.memory_bytes < 1 << 50
    assert found.disk_bytes > 0
    assert set(found.flags) <= set(_profile._FLAGS)


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_every_format_computes_the_chain(runtime: str, tmp_path: Path) -> None:
    if runtime == "openvino" and not openvino_here:
        pytest.skip("OpenVINO is not installed")
    from penjing.registry import lookup

    weights = chains.weights(128, 256)
    assert [w.shape for w in weights[:2]] == [(256, 128), (128, 256)]
    x = want = chains.inputs(9, 128, runtime)["x"]
    for weight in weights:
        want = want @ weight.T
    sizes = {}
    for name, form in FORMATS.items():
        folder = tmp_path / name
        folder.mkdir()
        path = folder / lookup("runtimes", runtime, "file")
        chains.write(weights, form, runtime, path)
        got = lookup("runtimes", runtime, "open")(path, threads=1).run({"x": x})
        error = np.linalg.norm(got - want) / np.linalg.norm(want)
        allowed = {"fp32": 1e-4, "int8": 0.15, "w8": 0.05, "w4": 0.6}
        assert error < allowed[name], name
        assert name == "fp32" or error > 1e-4, "nothing was quantized"
        files = [path] if path.is_file() else list(path.iterdir())
        sizes[name] = sum(f.stat().st_size for f in files)
    assert sizes["int8"] < sizes["fp32"] / 3
    assert sizes["w4"] < sizes["w8"] / 1.6


def test_formats_keeps_its_time_and_compares_with_its_own_runtime() -> None:
    start = time.monotonic()
    found = formats([(32, 256, 256), (1, 128, 512)], threads=1, seconds=2)
    assert time.monotonic() - start < 8
    assert [(s.tokens, s.format) for s in found] == [
        (tokens, name) for tokens in (32, 1) for name in FORMATS
    ]
    plain = {s.tokens: s for s in found if s.format == "fp32"}
    for speed in found:
        assert speed.microseconds is not None
        assert speed.speedup == pytest.approx(plain[speed.tokens].microseconds / speed.microseconds)
    assert plain[32].microseconds > plain[1].microseconds


def test_more_work_takes_longer() -> None:
    small, large = (
        formats([(tokens, 256, 256)], threads=1, seconds=0.5)[0] for tokens in (16, 512)
    )
    assert large.microseconds > 4 * small.microseconds


def test_bad_shapes_and_runtimes_are_refused() -> None:
    with pytest.raises(UsageError, match="shape"):
        formats([(0, 4, 4)])
    with pytest.raises(UsageError, match="nonsense"):
        formats([(1, 4, 4)], ["nonsense"])


def test_the_prediction_is_its_formula() -> None:
    speed = Speed("onnxruntime", "fp32", 100, 1000, 1000, 1e4, 1.0)  # 10 G multiplications a s
    cost = predict(
        parameters=10**7,
        widest=1000,
        multiplications=1e9,
        samples=300,
        evaluations=2,
        exports=4,
        speeds=[speed],
    )
    assert cost.memory_bytes == 600_000_000 + 200_000_000 + 24_000_000
    assert cost.disk_bytes == 6 * 40_000_000
    # 600 G multiplications, twice, at 10 G/s are 120 s; four exports of 5 s are 20 s.
    assert cost.minutes == pytest.approx(140 / 60)
    with pytest.raises(UsageError, match="float32"):
        predict(
            parameters=1,
            widest=1,
            multiplications=1,
            samples=1,
            evaluations=1,
            exports=1,
            speeds=[],
        )
