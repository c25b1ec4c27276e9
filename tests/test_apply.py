"""Apply and its journal: killed anywhere, the same bytes; anything else is refused or redone."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parent))
import networks as net
from penjing.apply import Journal, apply
from penjing.errors import InputError
from penjing.model import Model
from penjing.planes import Scheme
from penjing.quantizers import gptq
from penjing.recipe import Edit, Recipe
from penjing.steps.cut import Cut
from penjing.steps.fold import Fold
from penjing.steps.prune import Prune
from penjing.steps.quantize import Quantize
from penjing.steps.recover import Recover
from penjing.steps.shrink import Shrink

# Every kind of edit but fold; the front is edited twice, so what enters the blocks changes.
EVERYTHING = Recipe(
    (
        Cut(1),
        Prune(0.3, targets=("inp", "blocks.*")),
        Shrink(0.5),
        Recover(seconds=0, steps=3, lr=1e-3),
        Quantize(8, 0, "gptq", symmetric=True, activations=8),
    ),
    seed=3,
)
UNITS = (
    1 + 4 + 1 + 4 + 1 + 4
)  # two blocks are left: front, two, back; shrink has a whole one before


class Killed(BaseException):
    pass


def _killed(
    monkeypatch: pytest.MonkeyPatch,
    journal: Path,
    after: int,
    *,
    written: bool,
    model: Model | None = None,
    recipe: Recipe = EVERYTHING,
) -> None:
    """Run and stop at a unit: its file and line are on disk (`written`), or neither is."""
    count = 0
    write = Journal.write

    def stop(self: Journal, step: int, unit: str, edits: list[Edit]) -> None:
        nonlocal count
        if written:
            write(self, step, unit, edits)
        if count == after:
            raise Killed
        if not written:
            write(self, step, unit, edits)
        count += 1

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "write", stop)
        with pytest.raises(Killed):
            apply(model or net.stack(), recipe, net.arrays(), journal=journal)


@pytest.fixture(scope="module")
def undisturbed() -> Model:
    return apply(net.stack(), EVERYTHING, net.arrays()).model


def test_the_original_is_untouched_and_every_kind_is_made(undisturbed: Model) -> None:
    model = net.stack()
    done = apply(model, EVERYTHING, net.arrays()).done
    assert {d.kind for d in done} == {
        "patch", "drop", "mask", "slice", "weight", "quantize", "activation",
    }  # fmt: skip
    assert net.same(model, net.stack())
    assert {d.step for d in done} == {"cut", "prune", "shrink", "recover", "quantize"}
    assert "inp.weight" in {d.path for d in done if d.kind == "mask"}


def test_the_same_bytes_twice(undisturbed: Model, tmp_path: Path) -> None:
    again = apply(net.stack(), EVERYTHING, net.arrays(), journal=tmp_path / "j").model
    assert net.same(again, undisturbed)
    lines = (tmp_path / "j/journal.jsonl").read_text().splitlines()
    assert len(lines) == 1 + UNITS
    # All of it read back, nothing planned.
    finished = apply(net.stack(), EVERYTHING, net.arrays(), journal=tmp_path / "j").model
    assert net.same(finished, undisturbed)
    assert (tmp_path / "j/journal.jsonl").read_text().splitlines() == lines


@pytest.mark.parametrize("written", [True, False])
@pytest.mark.parametrize("after", range(UNITS))
def test_killed_at_every_unit(
    undisturbed: Model,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    after: int,
    written: bool,
) -> None:
    _killed(monkeypatch, tmp_path, after, written=written)
    again = apply(net.stack(), EVERYTHING, net.arrays(), journal=tmp_path).model
    assert net.same(again, undisturbed)


def test_killed_again_and_again(
    undisturbed: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for _ in range(UNITS):
        _killed(monkeypatch, tmp_path, 0, written=True)
    assert len((tmp_path / "journal.jsonl").read_text().splitlines()) == 1 + UNITS
    again = apply(net.stack(), EVERYTHING, net.arrays(), journal=tmp_path).model
    assert net.same(again, undisturbed)


CHILD = """
import os, signal, sys
sys.path[:0] = {paths!r}
import torch
torch.set_num_threads(1)
import networks as net
import test_apply as own
from penjing.apply import Journal, apply
write = Journal.write
count = 0
def kill(self, step, unit, edits):
    global count
    count += 1
    if count > {after}:
        # In the middle of a unit: its file is there, its line is torn.
        write(self, step, unit, edits)
        lines = self._lines.read_bytes()
        self._lines.write_bytes(lines[:-20])
        os.kill(os.getpid(), signal.SIGKILL)
    write(self, step, unit, edits)
Journal.write = kill
apply(net.stack(), own.EVERYTHING, net.arrays(), journal=__import__("pathlib").Path({journal!r}))
"""


def test_killed_for_real(tmp_path: Path) -> None:
    here = str(Path(__file__).parent)
    code = CHILD.format(paths=[here], after=6, journal=str(tmp_path))
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        wanted = apply(net.stack(), EVERYTHING, net.arrays()).model
        child = subprocess.run([sys.executable, "-c", code], timeout=120, capture_output=True)
        assert child.returncode == -signal.SIGKILL, child.stderr.decode()[-2000:]
        text = (tmp_path / "journal.jsonl").read_text()
        assert text.count("\n") == 7
        assert not text.endswith("\n")
        again = apply(net.stack(), EVERYTHING, net.arrays(), journal=tmp_path).model
    finally:
        torch.set_num_threads(threads)
    assert net.same(again, wanted)
    assert len([json.loads(x) for x in (tmp_path / "journal.jsonl").open()]) == 1 + UNITS


@pytest.mark.parametrize(
    "tail",
    [b'{"step": 1, "un', b"\xff\xfe\x00garbage\n", b"[1, 2]\n", b'{"step": 1}\n', b"\x00" * 100],
)
def test_a_torn_last_line(
    undisturbed: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tail: bytes
) -> None:
    _killed(monkeypatch, tmp_path, 5, written=True)
    with open(tmp_path / "journal.jsonl", "ab") as file:
        file.write(tail)
    again = apply(net.stack(), EVERYTHING, net.arrays(), journal=tmp_path).model
    assert net.same(again, undisturbed)
    lines = [json.loads(line) for line in (tmp_path / "journal.jsonl").open()]
    assert len(lines) == 1 + UNITS


def test_a_torn_first_line(undisturbed: Model, tmp_path: Path) -> None:
    (tmp_path / "journal.jsonl").write_text('{"key": "abc')
    again = apply(net.stack(), EVERYTHING, net.arrays(), journal=tmp_path).model
    assert net.same(again, undisturbed)


@pytest.mark.parametrize("how", ["flip", "cut", "gone"])
def test_a_spoiled_unit_is_done_again(
    undisturbed: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    _killed(monkeypatch, tmp_path, 7, written=True)
    files = sorted(tmp_path.glob("*.safetensors"))
    assert len(files) == 8
    for path in files[3:5]:
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content if how == "flip" else content[:-3])
        if how == "gone":
            path.unlink()
    again = apply(net.stack(), EVERYTHING, net.arrays(), journal=tmp_path).model
    assert net.same(again, undisturbed)


def test_only_unfinished_units_are_planned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = Recipe((Prune(0.5, "magnitude"),))
    _killed(monkeypatch, tmp_path, 2, written=True, recipe=recipe)
    planned = []
    plan = Prune.plan
    monkeypatch.setattr(
        Prune,
        "plan",
        lambda self, unit, stats: planned.append(unit.name) or plan(self, unit, stats),
    )
    apply(net.stack(), recipe, net.arrays(), journal=tmp_path)
    assert planned == ["blocks.2", "back"]


def _other(name: str) -> tuple[Model, Recipe, list[net.Batch], Model | None]:
    model, recipe, batches, original = net.stack(), EVERYTHING, net.arrays(), None
    if name == "step":
        recipe = Recipe((Cut(2), *EVERYTHING.steps[1:]), 3)
    elif name == "seed":
        recipe = Recipe(EVERYTHING.steps, 4)
    elif name == "data":
        batches = net.arrays(5)
    elif name == "shape of the data":
        batches = [{"x": b["x"].reshape(8, 8, 6)} for b in batches]
    elif name == "weights":  # two artifacts of one source
        with torch.no_grad():
            model.module.out.bias[0] += 1
    elif name == "original":
        original = net.stack()
        original.source = net.Source("factory", "tiny", "other")
    elif name == "structure":
        model.structure = [{"kind": "drop", "path": "blocks.3"}]
    return model, recipe, batches, original


@pytest.mark.parametrize(
    "name", ["step", "seed", "data", "shape of the data", "weights", "original", "structure"]
)
def test_another_run_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    _killed(monkeypatch, tmp_path, 2, written=True)
    before = (tmp_path / "journal.jsonl").read_bytes()
    model, recipe, batches, original = _other(name)
    with pytest.raises(InputError, match="the journal is of another run"):
        apply(model, recipe, batches, original=original, journal=tmp_path)
    assert (tmp_path / "journal.jsonl").read_bytes() == before


def test_a_second_writer_is_refused(tmp_path: Path) -> None:
    code = (
        "import fcntl, sys\n"
        f"lock = open({str(tmp_path / 'lock')!r}, 'w')\n"
        "fcntl.flock(lock, fcntl.LOCK_EX)\n"
        "print('held', flush=True)\n"
        "sys.stdin.read()\n"
    )
    recipe = Recipe((Prune(0.5, "magnitude"),))
    holder = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(InputError, match="another run is writing this journal"):
            apply(net.stack(), recipe, journal=tmp_path)
        assert not (tmp_path / "journal.jsonl").exists()
    finally:
        os.kill(holder.pid, signal.SIGKILL)  # the kernel frees the lock
        holder.wait()
    apply(net.stack(), recipe, journal=tmp_path)


def test_a_journal_that_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    recipe = Recipe((Prune(0.5, "magnitude"),))
    with pytest.raises(InputError, match="cannot use the journal"):
        apply(net.stack(), recipe, journal=tmp_path / "file")
    (tmp_path / "folder/journal.jsonl").mkdir(parents=True)
    with pytest.raises(InputError, match="cannot use the journal"):
        apply(net.stack(), recipe, journal=tmp_path / "folder")


def test_a_full_disk_leaves_what_is_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = Recipe((Prune(0.5, "magnitude"),))
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    _killed(monkeypatch, tmp_path, 0, written=True, recipe=recipe)
    try:
        # A block's masks are 400 bytes and their table.
        resource.setrlimit(resource.RLIMIT_FSIZE, (300, old[1]))
        with pytest.raises(InputError, match=r"cannot write the journal.*finished before is kept"):
            apply(net.stack(), recipe, net.arrays(), journal=tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
        signal.signal(signal.SIGXFSZ, handler)
    assert not list(tmp_path.glob("*.part"))
    assert net.same(
        apply(net.stack(), recipe, net.arrays(), journal=tmp_path).model,
        apply(net.stack(), recipe).model,
    )


def test_folds_come_back_from_a_journal(tmp_path: Path) -> None:
    model = net.resnet()
    recipe = Recipe((Fold(), Quantize(4)))
    wanted = apply(model, recipe, [model.example], journal=tmp_path).model
    again = apply(model, recipe, [model.example], journal=tmp_path).model
    assert net.same(again, wanted)
    assert torch.equal(again.run(model.example), wanted.run(model.example))
    assert "fold" in {s["kind"] for s in again.structure}


@dataclass(frozen=True)
class Dice:
    """A step that draws from torch's own generator."""

    name: ClassVar[str] = "dice"
    scope: ClassVar[str] = "block"
    needs: ClassVar[frozenset[str]] = frozenset()

    targets: tuple[str, ...] = ()

    def layers(self, unit: net.Any) -> dict[str, nn.Module]:
        return dict(unit.layers)

    def plan(self, unit: net.Any, stats: object) -> Iterator[Edit]:
        for path, layer in unit.layers.items():
            yield Edit("weight", f"{path}.weight", torch.randn(layer.weight.shape), "dice")


def test_random_numbers_are_each_units_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = Recipe((Dice(),), 5)
    wanted = apply(net.stack(), recipe).model
    _killed(monkeypatch, tmp_path, 2, written=True, recipe=recipe)
    torch.manual_seed(99)
    again = apply(net.stack(), recipe, net.arrays(), journal=tmp_path).model
    assert net.same(again, wanted)
    first, second = (wanted.module.blocks[i].up.weight for i in (0, 1))
    assert not torch.equal(first, second)
    assert not net.same(wanted, apply(net.stack(), Recipe((Dice(),), 6)).model)


@pytest.mark.parametrize("make", [net.bert, net.llama], ids=["bert", "llama"])
def test_transformers_killed_in_the_middle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make: net.Any
) -> None:
    texts = [net.text_batch(seed) for seed in (1, 2)]
    # The embeddings are the front: quantizing them changes what enters the first block.
    recipe = Recipe((Shrink(0.25), Quantize(4, 16, embeddings=8)))
    model = make(2, vocab_size=600)
    wanted = apply(model, recipe, texts).model
    assert any("embed" in name for name in wanted.planes)
    write = Journal.write
    # Steps are counted with what they begin with.
    for number, unit in ((1, model.blocks[1]), (2, "front"), (2, model.blocks[0])):

        def stop(self: Journal, step: int, name: str, edits: list[Edit]) -> None:
            write(self, step, name, edits)
            if (step, name) == (number, unit):  # noqa: B023
                raise Killed

        with monkeypatch.context() as patch:
            patch.setattr(Journal, "write", stop)
            with pytest.raises(Killed):
                apply(model, recipe, texts, journal=tmp_path)
    assert net.same(apply(model, recipe, texts, journal=tmp_path).model, wanted)


def test_blocks_are_calibrated_on_the_edited_front() -> None:
    """The first block's Gram matrix is that of the quantized front's output, not of the old one."""
    model, batches = net.stack(), net.arrays()
    small = apply(model, Recipe((Quantize(2, alpha=0.0, bias=False),)), batches).model
    rows = {}
    with torch.no_grad():
        for name, network in (("old", model), ("new", small)):
            x = torch.cat([network.module.inp(b["x"]).flatten(0, 1) for b in batches]).double()
            rows[name] = type("S", (), {"gram": x.T @ x / len(x)})
    weight = model.module.blocks[0].up.weight.detach()
    found = small.planes["blocks.0.up.weight"].codes
    assert torch.equal(found, gptq.fit(weight, Scheme(2), rows["new"]).codes)
    assert not torch.equal(found, gptq.fit(weight, Scheme(2), rows["old"]).codes)


def test_targets_that_match_nothing_are_said(tmp_path: Path) -> None:
    model = net.bert(2)
    step = Quantize(4, method="rtn", targets=("nope*",))
    with pytest.raises(InputError, match=r"targets of quantize match no layer; got nope\*"):
        apply(model, Recipe((step,)), journal=tmp_path / "journal")
    assert not (tmp_path / "journal").exists()
    # One glob that matches is enough: a recipe may serve several networks.
    either = Quantize(4, method="rtn", targets=("nope*", "encoder.layer.1.*"))
    assert apply(model, Recipe((either,))).model.planes


def test_targets_that_a_cut_took_away_are_said() -> None:
    recipe = Recipe((
        Prune(0.5, "magnitude", targets=("encoder.layer.2.*",)), Cut(2),
        Prune(0.6, "magnitude", targets=("encoder.layer.2.*",)),
    ))  # fmt: skip
    with pytest.raises(InputError, match=r"targets of prune match no layer; got encoder\.layer\.2"):
        apply(net.bert(3), recipe, [net.text_batch(1)])
    assert apply(net.bert(3), Recipe(recipe.steps[:2]), [net.text_batch(1)]).model.structure
