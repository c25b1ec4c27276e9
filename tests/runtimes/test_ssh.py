"""Against an sshd on the loopback address, which this machine reaches as a device."""

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
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

_SSHD = """
Port {port}
ListenAddress 127.0.0.1
HostKey {folder}/host
AuthorizedKeysFile {folder}/user.pub
PidFile {folder}/pid
StrictModes no
PasswordAuthentication no
PermitRootLogin yes
"""
_SSH = """
IdentityFile {folder}/user
IdentitiesOnly yes
UserKnownHostsFile {folder}/known
StrictHostKeyChecking accept-new
LogLevel ERROR
"""


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Of an sshd that takes a key of its own, with an `ssh` before the others that has it."""
    search = os.pathsep.join([os.environ["PATH"], "/usr/sbin", "/sbin"])
    sshd, ssh, keygen = (shutil.which(name, path=search) for name in ("sshd", "ssh", "ssh-keygen"))
    if not (sshd and ssh and keygen):
        pytest.skip("no sshd, ssh or ssh-keygen on this machine")
    folder = tmp_path_factory.mktemp("sshd")
    for name in ("host", "user"):
        subprocess.run([keygen, "-q", "-t", "ed25519", "-N", "", "-f", folder / name], check=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    for name, text in (("sshd_config", _SSHD), ("ssh_config", _SSH)):
        (folder / name).write_text(text.format(folder=folder, port=port))
    own = folder / "bin" / "ssh"
    own.parent.mkdir()
    own.write_text(f'#!/bin/sh\nexec {ssh} -F {folder}/ssh_config "$@"\n')
    own.chmod(0o755)
    with (folder / "log").open("wb") as log:
        server = subprocess.Popen([sshd, "-D", "-e", "-f", folder / "sshd_config"], stderr=log)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", f"{own.parent}{os.pathsep}{os.environ['PATH']}")
        try:
            end = time.monotonic() + 30
            while True:
                answer = subprocess.run([own, "-p", str(port), "127.0.0.1", "true"], check=False)
                if answer.returncode == 0:
                    break
                if server.poll() is not None or time.monotonic() > end:
                    reason = (folder / "log").read_text().strip().splitlines()[-1:]
                    pytest.skip(f"sshd does not serve here: {reason}")
                time.sleep(0.2)
            yield f"ssh://127.0.0.1:{port}?python={sys.executable}"
        finally:
            server.terminate()
            server.wait()


@pytest.fixture
def file(tmp_path: Path) -> Path:
    x, y = (helper.make_tensor_value_info(n, TensorProto.FLOAT, ["n", 3]) for n in ("x", "output"))
    graph = helper.make_graph([helper.make_node("Mul", ["x", "x"], ["output"])], "g", [x], [y])
    opset = [helper.make_opsetid("", 21)]
    onnx.save(helper.make_model(graph, opset_imports=opset, ir_version=10), tmp_path / "a b'.onnx")
    return tmp_path / "a b'.onnx"


def test_a_file_is_run_and_timed_there_and_nothing_stays(address: str, file: Path) -> None:
    example = {"x": torch.ones(2, 3)}
    model = Model(nn.Identity(), "tensor", example, Source("factory", "tiny", "0"))
    candidate = Candidate(file, "onnxruntime", 1)
    with Host(address) as host:
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


def test_what_goes_wrong_there_is_told_here(address: str, file: Path) -> None:
    file.write_bytes(b"no model")
    with Host(address) as host:
        with pytest.raises(InputError, match="cannot load"):
            Remote(file, "onnxruntime", threads=1, host=host)
        with pytest.raises((ExportError, InputError)):
            Remote(file, "openvino", threads=1, host=host)
        place = Path(host.folder)
    assert not place.exists()


def test_a_device_is_recorded(address: str) -> None:
    found = kits.record(address, threads=(1,), seconds=0.2, shapes=[(32, 32)], tokens=[4])
    assert sorted(k["format"] for k in found["kernels"]) == sorted(FORMATS)


def test_a_device_without_its_python_is_told_and_left_clean(
    address: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    with pytest.raises(InputError, match="refuses"):
        Host(f"{address.partition('?')[0]}?python=no-such-python").__enter__()


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
