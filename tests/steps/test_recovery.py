"""A recovery that is killed and started again ends with the bytes of the undisturbed one."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

# Each run is a process of its own, forked from one that has only imported.
SCRIPT = """
import hashlib, json, os, signal, sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import safetensors, torch
torch.set_num_threads(1)
import networks as net
from penjing import checkpoint
from penjing.apply import apply
from penjing.recipe import Recipe
from penjing.steps.prune import Prune
from penjing.steps.recover import Recover

checkpoint.EVERY = 0.0
folder = Path(sys.argv[2])
STEPS = 40

def run(journal, output):
    model = net.stack()
    recipe = Recipe((Prune(0.7, "magnitude"),
                     Recover(seconds=0, steps=STEPS, lr=3e-3, patience=15, hidden=1.0)))
    found = apply(model, recipe, net.arrays(9), journal=journal).model
    digest = hashlib.sha256()
    for name, value in sorted(found.module.state_dict().items()):
        digest.update(name.encode() + value.numpy().tobytes())
    output.write_text(digest.hexdigest())

def start(journal, output, until=None):
    pid = os.fork()
    if not pid:
        run(journal, output)
        os._exit(0)
    path = journal / "01-training.safetensors"
    while until is not None:
        if path.exists():
            with safetensors.safe_open(path, "pt") as file:
                step = json.loads(file.metadata()["training"])["notes"]["step"]
            if step >= until:
                os.kill(pid, signal.SIGKILL)
                break
        time.sleep(0.002)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

assert start(folder / "whole", folder / "whole.txt") == 0
for until in (2, 13, 27):
    assert start(folder / "killed", folder / "killed.txt", until) == -signal.SIGKILL
    assert not (folder / "killed.txt").exists()
assert start(folder / "killed", folder / "killed.txt") == 0
assert not list((folder / "killed").glob("*training*"))
"""


def test_killed_at_three_points_it_ends_with_the_same_bytes(tmp_path: Path) -> None:
    tests = Path(__file__).parent.parent
    command = [sys.executable, "-W", "ignore", "-c", SCRIPT, str(tests), str(tmp_path)]
    subprocess.run(command, check=True, timeout=240)
    texts = [(tmp_path / name).read_text() for name in ("whole.txt", "killed.txt")]
    assert len(texts[0]) == 64
    assert texts[0] == texts[1]
