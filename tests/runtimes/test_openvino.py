"""The OpenVINO session against numpy, and its errors."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from penjing.errors import InputError

ov = pytest.importorskip("openvino")

from penjing.runtimes import openvino as runtime  # noqa: E402


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    op = ov.opset13
    x = op.parameter([-1, 3], np.float32, name="x")
    ids = op.parameter([-1], np.int64, name="ids")
    rows = op.gather(op.constant(np.arange(12, dtype=np.float32).reshape(4, 3)), ids, 0)
    graph = ov.Model([op.add(op.multiply(x, x), rows).output(0)], [x, ids], "g")
    for parameter, name in ((x, "x"), (ids, "ids")):
        parameter.output(0).set_names({name})
    ov.save_model(graph, tmp_path / "model.xml", compress_to_fp16=False)
    return tmp_path


def test_runs_and_gives_its_own_array(folder: Path) -> None:
    session = runtime.open(folder, threads=1)
    assert session.inputs == {"x": (None, 3), "ids": (None,)}
    x = np.array([[1, 2, 3], [4, 5, 6]], np.float32)
    first = session.run({"x": x, "ids": np.array([3, 0], np.int32), "surplus": x})
    session.run({"x": x * 0, "ids": np.array([0, 0])})
    np.testing.assert_array_equal(first, [[10, 14, 20], [16, 26, 38]])


def test_float32_stays_float32(folder: Path) -> None:
    session = runtime.open(folder / "model.xml", threads=1)
    x = np.full((1, 3), 1.001, np.float32)
    got = session.run({"x": x, "ids": np.array([0])})
    # bfloat16 has 8 bits of precision: 1.001 would become 1.
    np.testing.assert_allclose(got, x * x + [[0, 1, 2]], rtol=1e-6)


def test_errors_are_typed(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no such OpenVINO model.*nowhere"):
        runtime.open(tmp_path / "nowhere", threads=1)
    session = runtime.open(folder, threads=1)
    with pytest.raises(InputError, match="input ids is missing"):
        session.run({"x": np.zeros((1, 3), np.float32)})
    with pytest.raises(InputError, match="shape of input x"):
        session.run({"x": np.zeros((1, 5), np.float32), "ids": np.array([0])})
    (folder / "model.xml").write_text("<net")
    with pytest.raises(InputError, match="cannot read"):
        runtime.open(folder, threads=1)


def test_an_interrupt_after_a_session_was_opened_is_an_interrupt(tmp_path: Path) -> None:
    """Sessions closed in the order they were opened leave a signal stack that is freed."""
    code = (
        "import os, signal, sys; from pathlib import Path\n"
        "from penjing.runtimes import openvino as runtime\n"
        "held = [runtime.open(Path(sys.argv[1]), threads=1) for _ in range(4)]\n"
        "while held:\n    del held[0]\n"
        "try:\n    os.kill(os.getpid(), signal.SIGINT)\n    signal.pause()\n"
        "except KeyboardInterrupt:\n    print('interrupted')\n"
    )
    x = ov.opset13.parameter([1, 4], dtype=np.float32, name="x")
    ov.save_model(ov.Model([ov.opset13.relu(x)], [x]), tmp_path / "model.xml")
    argv = [sys.executable, "-c", code, str(tmp_path / "model.xml")]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "interrupted\n"), done.stderr
