"""Proofs: against zeros that are written into the weights, and groups that lack something."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).parent))
from networks import Residual
from penjing.channelmap import map_of
from penjing.coupling import Member, Units, drawn, silence
from penjing.proof import _Silenced, inside, prove


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(10, 12, num_layers=2, batch_first=True)
        self.head = nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x)[0][:, -1])


IMAGE, WORDS = torch.randn(1, 3, 8, 8), torch.randn(2, 7, 10)


def _case(kind: type[nn.Module]) -> tuple[nn.Module, Any, list[Units]]:
    torch.manual_seed(0)
    module, x = kind().eval(), IMAGE if kind is Residual else WORDS

    def run(one: nn.Module, dtype: torch.dtype = torch.float64) -> Any:
        with torch.no_grad():
            return one(x.to(dtype))

    return drawn(module), run, [one.group for one in map_of(module, run).free]


def test_a_group_that_lacks_a_member_or_has_it_elsewhere_is_found() -> None:
    probe, run, (one,) = _case(Residual)
    kept = [0, 3, 5]
    assert prove(probe, run, [(one, kept)])[0] < 1e-12
    for left_out in ("head.weight", "norm.bias"):
        wrong = Units(tuple(m for m in one.members if m.name != left_out))
        assert prove(probe, run, [(wrong, kept)])[0] > 1e-3
    shifted = Units(tuple(
        Member(m.name, m.dim, m.summed,
               m.places.roll(1, 0) if m.name == "norm.weight" else m.places)
        for m in one.members
    ))  # fmt: skip
    assert prove(probe, run, [(shifted, kept)])[0] > 1e-3


@pytest.mark.parametrize("kind", [Residual, Recurrent])
def test_zeros_put_in_on_the_way_are_those_written_into_the_weights(kind: type[nn.Module]) -> None:
    probe, run, groups = _case(kind)
    plans = [(group, [0, 1]) for group in groups]
    plain = run(probe)
    with _Silenced(probe, plans):
        found = run(probe)
    assert torch.equal(run(probe), plain)
    silence(probe, plans)
    torch.testing.assert_close(found, run(probe), rtol=1e-12, atol=1e-12)
    assert float((found - plain).abs().max()) > 1e-3


def test_a_proof_leaves_the_network_as_it_was() -> None:
    probe, run, groups = _case(Recurrent)
    before = {n: t.clone() for n, t in probe.state_dict().items()}
    wanted = run(probe)
    assert prove(probe, run, [(group, [0, 1]) for group in groups], [])[0] < 1e-12
    assert all(torch.equal(before[n], t) for n, t in probe.state_dict().items())
    assert torch.equal(run(probe), wanted)
    assert probe.lstm.hidden_size == 12


class Block(nn.Module):
    """`half` sets the number of what it cuts out; `own` does not say how many there are."""

    def __init__(self, width: int | None) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 8), nn.Linear(8, 6)
        self.more, self.less = nn.Linear(6, 10), nn.Linear(10, 6)
        self.width = width

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        x = x + self.down(self.up(x).reshape(*x.shape[:-1], self.width or 8)) * scale
        return x.add_(self.less(F.relu(self.more(x))))


class Blocks(nn.Module):
    def __init__(self, widths: list[int | None]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block(width) for width in widths)
        self.norm, self.head = nn.LayerNorm(6), nn.Linear(6, 3)
        self.runs = [0]

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x, scale=0.5)
        self.runs[0] += 1
        return self.head(self.norm(x))


def test_groups_are_tried_in_the_smallest_module_that_has_them() -> None:
    torch.manual_seed(0)
    module = Blocks([8, None, 8, 8, None]).eval()
    x = torch.randn(2, 5, 6)
    found = map_of(module, lambda m, dtype: m(x.to(dtype)))
    free = {one.group.name: [(s.path, s.name, s.value) for s in one.known] for one in found.free}
    assert free == {
        **{f"layers.{n}.up.weight": [(f"layers.{n}", "width", 4)] for n in (0, 2, 3)},
        **{f"layers.{n}.more.weight": [] for n in range(5)},
    }
    frozen = {f.name for f in found.frozen if "its code holds their number" in f.reason}
    assert frozen == {f"layers.{n}.{m}" for n in (1, 4)
                      for m in ("up.weight", "up.bias", "down.weight")}  # fmt: skip


def test_a_module_alone_runs_on_what_it_has_in_the_whole() -> None:
    torch.manual_seed(0)
    module = Blocks([8, 8]).eval()
    x = torch.randn(2, 5, 6)
    seen = []
    handle = module.layers[1].register_forward_hook(lambda m, args, out: seen.append(out.clone()))
    with torch.no_grad():
        runs = inside(module, lambda m: m(x), ["layers.1", "layers"])
        handle.remove()
        again = [runs["layers.1"](module.layers[1]) for _ in range(2)]
    assert set(runs) == {"layers.1"}  # a list is not called
    assert all(torch.equal(one[0], seen[0]) for one in again)  # though it writes into what it has


def test_what_a_module_gives_may_have_the_channels_too() -> None:
    """Nothing reads them there, so that only the whole shows that they can go."""

    class Inner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 6)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            y = self.a(x)
            return self.b(y), y

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.block = Inner(), Block(None)

        def forward(self, x: Tensor) -> Tensor:
            return self.block(self.inner(x)[0])

    torch.manual_seed(0)
    x = torch.randn(2, 6)
    found = map_of(Outer().eval(), lambda m, dtype: m(x.to(dtype)))
    assert {one.group.name for one in found.free} == {"inner.a.weight", "block.more.weight"}
