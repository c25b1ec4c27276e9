"""Against an sshd on the loopback address, which this machine reaches as a device."""

import shutil
import socket
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper
from torch import nn

from penjing.errors import ExportError, InputError, UsageError
from penjing.fit import kit as kits
from penjing.fit.space import FORMATS
from penjing.measure import Candidate, measure_files
from penjing.model import Model, Source
from penjing.runtimes._remote import Remote
from penjing.runtimes._ssh import Host


@pytest.fixture
def file(tmp_path: Path) -> Path:
    x, y = (helper.make_tensor_value_info(n, TensorProto.FLOAT, ["n", 3]) for n in ("x", "output"))
    graph = helper.make_graph([helper.make_node("Mul", ["x", "x"], ["output"])], "g", [x], [y])
    opset = [helper.make_opsetid("", 21)]
    onnx.save(helper.make_model(graph, opset_imports=opset, ir_version=10), tmp_path / "a b'.onnx")
    return tmp_path / "a b'.onnx"


def test_a_file_is_run_and_timed_there_and_nothing_stays(device_address: str, file: Path) -> None:
    example = {"x": torch.ones(2, 3)}
    model = Model(nn.Identity(), "tensor", example, Source("factory", "tiny", "0"))
    candidate = Candidate(file, "onnxruntime", 1)
    with Host(device_address) as host:
        assert host.cores >= 1
        place = Path(host.folder)
        with Remote(file, "onnxruntime", threads=1, host=host) as session:
            x = np.arange(6, dtype=np.float32).reshape(2, 3)
            np.testing.assert_array_equal(session.run({"x": x}), x * x)
            assert session._process.args[0] == "ssh"
            assert not {"torch", "transformers", "psutil"} & set(session.modules())
        found = measure_files([candidate, candidate], model, seconds=1, host=host)
        # A file is sent once: it lies beside the code alone.
        assert len(list(place.iterdir())) == 2
    assert not place.exists()
    assert all(f.measurement.latency_ms.median > 0 for f in found)
    assert found[0].measurement.peak_memory_bytes > 10_000_000
    assert found[0].measurement.size_bytes == file.stat().st_size


def test_what_goes_wrong_there_is_told_here(device_address: str, file: Path) -> None:
    file.write_bytes(b"no model")
    with Host(device_address) as host:
        with pytest.raises(InputError, match="cannot load"):
            Remote(file, "onnxruntime", threads=1, host=host)
        with pytest.raises((ExportError, InputError)):
            Remote(file, "openvino", threads=1, host=host)
        place = Path(host.folder)
    assert not place.exists()


def test_a_device_is_recorded(device_address: str) -> None:
    found = kits.record(device_address, threads=(1,), seconds=0.2, shapes=[(32, 32)], tokens=[4])
    assert sorted(k["format"] for k in found["kernels"]) == sorted(FORMATS)


def test_a_device_without_its_python_is_told_and_left_clean(
    device_address: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    with pytest.raises(InputError, match="refuses"):
        Host(f"{device_address.partition('?')[0]}?python=no-such-python").__enter__()


@pytest.mark.parametrize("text", ["ssh://", "http://host", "host", "ssh://-oProxyCommand=x"])
def test_addresses_that_are_none(text: str) -> None:
    with pytest.raises(UsageError, match="address"):
        Host(text)


def test_a_device_that_does_not_answer() -> None:
    if shutil.which("ssh") is None:
        pytest.skip("no ssh on this machine")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.raises(InputError, match="refuses"), Host(f"ssh://127.0.0.1:{port}"):
        pass
