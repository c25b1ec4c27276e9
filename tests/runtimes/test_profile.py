"""The kit, run as a device runs it: by a Python that has numpy and onnxruntime alone."""

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from penjing.errors import InputError
from penjing.fit import kit as kits
from penjing.fit.space import FORMATS
from penjing.runtimes import _profile
from penjing.runtimes._kit import pack

# Imports of anything else end the process.
_GUARD = """
import sys
class Guard:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"torch", "transformers", "onnx", "scipy", "psutil", "click"}:
            sys.exit(f"imported {name}")
sys.meta_path.insert(0, Guard())
import runpy
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def run(kit: Path, *arguments: str, guard: str = _GUARD) -> subprocess.CompletedProcess[str]:
    bare = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    command = [sys.executable, "-P", "-c", guard, str(kit), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=bare)


@pytest.fixture(scope="module")
def kit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("kit") / "kit.pyz"
    kits.write_kit(path, [(32, 64)], [1, 8])
    return path


def test_a_kit_runs_with_the_runtime_alone(kit: Path, tmp_path: Path) -> None:
    done = run(kit, str(tmp_path / "pi.json"), "--threads", "1,2", "--seconds", "0.2")
    assert done.returncode == 0, done.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["pi.json"]
    found = json.loads((tmp_path / "pi.json").read_text())
    assert found["cores"] == _profile.cores() >= 1
    assert found["memory_bytes"] > 1e8
    assert 1e8 < found["bytes_per_second"] < 1e13
    cells = [(k["format"], k["tokens"], k["threads"]) for k in found["kernels"]]
    wanted = [(f, t, n) for n in (1, 2) for t in (1, 8) for f in FORMATS]
    assert sorted(cells) == sorted(wanted)
    assert all(0 < k["microseconds"] < 1e6 for k in found["kernels"])


def test_a_kit_says_what_is_wrong(kit: Path, tmp_path: Path) -> None:
    done = run(kit, str(tmp_path / "none" / "pi.json"))
    assert done.returncode == 1
    assert done.stderr.startswith("kit: no such folder")
    assert run(kit, str(tmp_path / "pi.json"), "--threads", "0").returncode == 2
    code = tmp_path / "code.pyz"
    pack(code)
    with zipfile.ZipFile(code) as archive:
        assert sum(info.file_size for info in archive.infolist()) < 50_000
    done = run(code, str(tmp_path / "pi.json"))
    assert done.stderr.startswith("kit: no kernels")
    lacking = _GUARD.replace('"psutil"', '"onnxruntime"').replace(
        'sys.exit(f"imported {name}")', "raise ImportError(name)"
    )
    done = run(kit, str(tmp_path / "pi.json"), guard=lacking)
    assert "pip install numpy onnxruntime" in done.stderr
    assert not (tmp_path / "pi.json").exists()


def test_a_kit_is_not_written_over(kit: Path) -> None:
    with pytest.raises(InputError, match="exists"):
        pack(kit)


def test_this_machine_is_recorded_in_a_process_of_its_own() -> None:
    found = kits.record(threads=(1,), seconds=0.2, shapes=[(32, 32)], tokens=[4])
    assert {k["threads"] for k in found["kernels"]} == {1}
    assert len(found["kernels"]) == len(FORMATS)


def test_fewer_cores_are_seen_where_fewer_may_be_used() -> None:
    if not hasattr(os, "sched_setaffinity"):
        pytest.skip("no affinity on this system")
    was = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(was)})
        assert _profile.cores() == 1
    finally:
        os.sched_setaffinity(0, was)
