"""Files and folders are whole or not there: full disk, failure, kill."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from penjing.errors import InputError
from penjing.files import (
    check_output,
    folder_beside,
    holds_work,
    kept_in,
    read_json,
    sha256,
    whole_file,
    whole_folder,
    write_json,
)


@pytest.mark.parametrize(
    ("file", "there"),
    [
        ("00-whole.safetensors", True),
        ("00-training.shards/000000005/notes.json", True),
        ("00-training.shards/000000005/shard.safetensors", False),  # torn: its notes come last
        ("journal.jsonl", False),
        ("00-whole.part", False),
    ],
)
def test_what_there_is_to_go_on_from(file: str, there: bool, tmp_path: Path) -> None:
    (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / file).write_text("x")
    assert holds_work(tmp_path) is there
    assert (kept_in(tmp_path) == "nothing is kept") is not there


def test_what_another_run_wrote_meanwhile_stays(tmp_path: Path) -> None:
    def both() -> None:
        with whole_folder(tmp_path / "out") as slow:
            (slow / "manifest.json").write_text("slow")
            with whole_folder(tmp_path / "out") as fast:
                (fast / "manifest.json").write_text("fast")

    with pytest.raises(InputError, match="exists"):
        both()
    assert (tmp_path / "out" / "manifest.json").read_text() == "fast"
    assert os.listdir(tmp_path) == ["out"]

    def late(path: Path) -> None:
        (tmp_path / "file").write_text("fast")
        path.write_text("slow")

    with pytest.raises(InputError, match="exists"):
        whole_file(tmp_path / "file", late)
    assert (tmp_path / "file").read_text() == "fast"


LIMITED = """
import resource, sys
from pathlib import Path
from penjing.errors import InputError
from penjing.files import whole_file, whole_folder
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
out = Path(sys.argv[2])
data = b"x" * 1_000_000
try:
    if sys.argv[1] == "file":
        whole_file(out, lambda path: path.write_bytes(data), overwrite=True)
    else:
        with whole_folder(out, overwrite=True) as folder:
            (folder / "small").write_bytes(b"fits")
            (folder / "large").write_bytes(data)
except InputError as error:
    print(error)
    sys.exit(error.exit_status)
"""


@pytest.mark.parametrize("kind", ["file", "folder"])
@pytest.mark.parametrize("existing", [False, True])
def test_a_full_disk_leaves_what_was_there(tmp_path: Path, kind: str, existing: bool) -> None:
    out = tmp_path / "out.bin"
    if existing and kind == "file":
        out.write_text("before")
    elif existing:
        out.mkdir()
        (out / "kept").write_text("before")
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, kind, str(out)], capture_output=True, text=True
    )
    assert done.returncode == 1, done.stderr
    assert "cannot write" in done.stdout
    assert "File too large" in done.stdout
    assert [p.name for p in tmp_path.iterdir()] == (["out.bin"] if existing else [])
    if existing:
        assert (out if kind == "file" else out / "kept").read_text() == "before"


def test_a_killed_writer_leaves_no_output(tmp_path: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path; from penjing.files import whole_folder\n"
        "with whole_folder(Path(sys.argv[1])) as folder:\n"
        "    (folder / 'part').write_text('half'); print('in', flush=True); time.sleep(60)"
    )
    out = tmp_path / "out"
    child = subprocess.Popen(
        [sys.executable, "-c", code, str(out)], stdout=subprocess.PIPE, text=True
    )
    assert child.stdout is not None
    assert child.stdout.readline() == "in\n"
    child.send_signal(signal.SIGKILL)
    assert child.wait(10) == -signal.SIGKILL
    child.stdout.close()
    assert not out.exists()
    with whole_folder(out) as folder:
        (folder / "manifest.json").write_text("{}")
    assert sorted(p.name for p in out.iterdir()) == ["manifest.json"]
    assert [p.name for p in tmp_path.iterdir()] == ["out"]  # nor what was half written


def test_what_a_killed_process_left_goes_and_what_another_works_in_stays(tmp_path: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path; from penjing.files import folder_beside\n"
        "with folder_beside(Path(sys.argv[1]), 'work') as folder:\n"
        "    print(folder.name, flush=True); time.sleep(60)"
    )
    children = []
    for name in ("out", "out", "out.b"):
        argv = [sys.executable, "-c", code, str(tmp_path / name)]
        child = subprocess.Popen(argv, stdout=subprocess.PIPE, text=True)
        assert child.stdout is not None
        children.append((child, child.stdout.readline().strip()))
    for child, _ in (children[0], children[2]):
        child.kill()
        child.wait(10)
    with folder_beside(tmp_path / "out", "work") as mine:
        # The dead one's is gone; that of the living and that of another output are there.
        assert {p.name for p in tmp_path.iterdir()} == {children[1][1], children[2][1], mine.name}
    children[1][0].kill()
    for child, _ in children:
        child.wait(10)
        assert child.stdout is not None
        child.stdout.close()


def test_a_failure_in_the_body_leaves_nothing(tmp_path: Path) -> None:
    def fail(path: Path) -> None:
        path.write_text("half")
        raise ValueError("boom")

    with pytest.raises(ValueError, match="boom"):
        whole_file(tmp_path / "a.bin", fail)


def test_an_interrupt_in_the_body_leaves_nothing(tmp_path: Path) -> None:
    def interrupted() -> None:
        with whole_folder(tmp_path / "b") as folder:
            (folder / "x").write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert list(tmp_path.iterdir()) == []


def test_written_whole_readable_and_with_its_suffix(tmp_path: Path) -> None:
    seen = []
    whole_file(tmp_path / "a.npy", lambda path: (seen.append(path.suffix), path.write_text("1"))[0])
    assert (tmp_path / "a.npy").read_text() == "1"
    assert seen == [".npy"]
    with whole_folder(tmp_path / "f") as folder:
        (folder / "sub").mkdir()
        (folder / "sub" / "x").write_text("2")
    assert (tmp_path / "f" / "sub" / "x").read_text() == "2"
    assert (tmp_path / "a.npy").stat().st_mode & 0o777 == 0o644
    assert (tmp_path / "f").stat().st_mode & 0o777 == 0o755
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.npy", "f"]


def test_overwriting_replaces_the_whole_folder(tmp_path: Path) -> None:
    for name in ("old", "new"):
        with whole_folder(tmp_path / "f", overwrite=True) as folder:
            (folder / name).write_text(name)
    assert [p.name for p in (tmp_path / "f").iterdir()] == ["new"]
    assert [p.name for p in tmp_path.iterdir()] == ["f"]


def test_outputs_are_refused_before_any_work(tmp_path: Path) -> None:
    there = tmp_path / "there"
    there.write_text("x")
    with pytest.raises(InputError, match="the output exists"):
        check_output(there)
    with pytest.raises(InputError, match="the output is the input"):
        check_output(tmp_path / "." / "there", True, (there,))
    with pytest.raises(InputError, match="folder does not exist"):
        check_output(tmp_path / "no" / "out")
    with pytest.raises(InputError, match="cannot be written"):
        check_output(Path("/proc/out.npy"))
    with pytest.raises(InputError, match="the output exists"), whole_folder(there):
        pytest.fail("the body ran")
    assert there.read_text() == "x"


def test_sha256_against_hashlib(tmp_path: Path) -> None:
    data = os.urandom(3_000_000)
    (tmp_path / "x").write_bytes(data)
    assert sha256(tmp_path / "x") == hashlib.sha256(data).hexdigest()


def test_json(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    write_json(path, {"é": [1, None, "盆景"]})
    assert (
        json.loads(path.read_text(encoding="utf-8")) == read_json(path) == {"é": [1, None, "盆景"]}
    )
    with pytest.raises(ValueError, match="JSON compliant"):
        write_json(path, float("nan"))
    started = time.monotonic()
    for text, message in (
        (b"{", "not JSON"),
        (b"\xff", "not JSON"),
        (b"[" * 200_000, "not JSON"),
        (b" " * 2000, "too large"),
    ):
        path.write_bytes(text)
        with pytest.raises(InputError, match=message):
            read_json(path, limit=1000 if message == "too large" else 10**6)
    assert time.monotonic() - started < 2
    with pytest.raises(InputError, match="no such file"):
        read_json(tmp_path / "none")
