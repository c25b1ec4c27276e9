"""Groups of channels: of small networks by hand, and of all by what silencing and removing give."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).parent))
from networks import Residual
from penjing.axisrules import follow
from penjing.channelmap import ChannelMap, map_of
from penjing.coupling import coupled, drawn, remove, silence, slices


class Shuffle(nn.Module):
    """Channels shuffled, then split in halves that go two ways."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 12, 1)
        self.g = nn.Conv2d(12, 12, 3, padding=1, groups=12)
        self.way = nn.Conv2d(6, 6, 1)
        self.end = nn.Conv2d(12, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.silu(self.g(self.a(x)))
        n, c, h, w = x.shape
        x = x.reshape(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)
        left, right = x.chunk(2, 1)
        return self.end(torch.cat([left, F.relu(self.way(right))], 1)).mean((2, 3))


class Dense(nn.Module):
    """Each layer reads all before it."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Conv2d(4 + 6 * k, 6, 3, padding=1) for k in range(3))
        self.norms = nn.ModuleList(nn.BatchNorm2d(4 + 6 * k) for k in range(3))
        self.stem = nn.Conv2d(3, 4, 1)
        self.head = nn.Linear(22, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for layer, norm in zip(self.layers, self.norms, strict=True):
            x = torch.cat([x, layer(F.relu(norm(x)))], 1)
        return self.head(F.adaptive_avg_pool2d(x, 1).flatten(1))


class Excite(nn.Module):
    """Squeeze and excitation, with a gate of two branches in one layer."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Conv2d(3, 16, 1)
        self.squeeze, self.excite = nn.Linear(16, 6), nn.Linear(6, 16)
        self.gate = nn.Linear(16, 20)
        self.down = nn.Linear(10, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.up(x)
        s = torch.sigmoid(self.excite(F.gelu(self.squeeze(x.mean((2, 3))))))
        x = (x * s[:, :, None, None]).amax((2, 3))
        one, other = self.gate(x).chunk(2, -1)
        return self.down(F.silu(one) * other)


class Attention(nn.Module):
    """Queries, keys and values of one layer, with a number of heads that the module keeps."""

    def __init__(self) -> None:
        super().__init__()
        self.heads, self.size = 4, 6
        self.embed = nn.Embedding(11, 10)
        self.norm = nn.LayerNorm(10)
        self.qkv = nn.Linear(10, 72)
        self.out = nn.Linear(24, 10)
        self.head = nn.Linear(10, 3)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        n, t, _ = x.shape
        qkv = self.qkv(self.norm(x)).reshape(n, t, 3, self.heads, self.size).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(*qkv.unbind(0), is_causal=True)
        return self.head(x + self.out(y.transpose(1, 2).reshape(n, t, self.heads * self.size)))


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 10)
        self.lstm = nn.LSTM(10, 12, num_layers=2, batch_first=True)
        self.head = nn.Linear(12, 3)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.lstm(self.embed(ids))[0][:, -1])


class Shuffled(nn.Module):
    """Two branches whose channels are shuffled in pairs: of both as many must stay."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 6, 1), nn.Conv2d(3, 6, 3, 1, 1)
        self.c = nn.Conv2d(12, 8, 1)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        both = torch.cat([self.a(x), self.b(x)], 1)
        x = torch.relu(self.c(nn.functional.channel_shuffle(both, 2)))
        return self.head(x.mean((2, 3)))


class Turned(nn.Module):
    """A transposed convolution between two others."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 6, 3)
        self.b = nn.ConvTranspose2d(6, 8, 3, stride=2)
        self.c = nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(F.leaky_relu(self.b(F.pad(F.relu(self.a(x)), (1, 1)))))


IMAGE, TOKENS = torch.randn(1, 3, 8, 8), torch.randint(0, 11, (2, 7))
CASES: dict[str, tuple[Callable[[], nn.Module], Tensor, list[tuple[str, int]]]] = {
    # Name of a group's first parameter, and its units.
    "residual": (Residual, IMAGE, [("a.weight", 8)]),
    # A channel of each half before the shuffle, and of each half behind it.
    "shuffle": (Shuffle, IMAGE, [("a.weight", 3), ("way.weight", 6)]),
    "dense": (Dense, IMAGE, [("layers.0.weight", 6), ("layers.1.weight", 6),
                             ("layers.2.weight", 6), ("stem.weight", 4)]),
    "excite": (Excite, IMAGE, [("up.weight", 16), ("squeeze.weight", 6), ("gate.weight", 10)]),
    "attention": (Attention, TOKENS, [("qkv.weight", 4)]),
    "recurrent": (Recurrent, TOKENS, [("embed.weight", 10), ("lstm.weight_ih_l0", 12)]),
    "shuffled": (Shuffled, IMAGE, [("a.weight", 6), ("c.weight", 8)]),
    "turned": (Turned, IMAGE, [("a.weight", 6), ("b.weight", 8)]),
}  # fmt: skip


def _map(name: str) -> tuple[nn.Module, Callable[[nn.Module], Any], ChannelMap]:
    make, x, _ = CASES[name]
    torch.manual_seed(0)
    module = make().eval()

    def run(one: nn.Module, dtype: torch.dtype = torch.float64) -> Any:
        return one(x.to(dtype) if x.is_floating_point() else x)

    return module, run, map_of(module, run)


@pytest.mark.parametrize("name", CASES)
def test_the_groups_are_those_found_by_hand(name: str) -> None:
    _, _, found = _map(name)
    groups = [(one.group.name, one.group.count) for one in found.free]
    assert sorted(groups) == sorted(CASES[name][2])


@pytest.mark.parametrize("name", CASES)
def test_silenced_equals_removed_and_has_fewer_parameters(name: str) -> None:
    module, run, found = _map(name)
    for keep in (1, 2):
        large, small = drawn(module, seed=5), drawn(module, seed=5)
        with torch.no_grad():
            was = run(large)
        plans = [(one.group, list(range(keep))) for one in found.free]
        silence(large, plans)
        remove(small, plans, [s for one in found.free for s in one.settings(keep)])
        with torch.no_grad():
            wanted, got = run(large), run(small)
        torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-9)
        assert float((was - wanted).abs().max()) > 1e-3
        fewer, all_of_them = (sum(p.numel() for p in m.parameters()) for m in (small, large))
        assert fewer < 0.8 * all_of_them


def test_members_of_a_residual_stream() -> None:
    _, _, found = _map("residual")
    (one,) = found.free
    members = {(m.name, m.dim): (m.summed, m.places.tolist()) for m in one.group.members}
    rows = {("a.weight", 0), ("a.bias", 0), ("norm.weight", 0), ("norm.bias", 0),
            ("norm.running_mean", 0), ("norm.running_var", 0), ("deep.weight", 0),
            ("deep.bias", 0), ("b.weight", 0)}  # fmt: skip
    assert set(members) == rows | {("b.weight", 1), ("head.weight", 1)}
    assert all(members[key] == (False, [[k] for k in range(8)]) for key in rows)
    assert members["b.weight", 1] == (True, [[k] for k in range(8)])
    assert members["head.weight", 1] == (True, [list(range(16 * k, 16 * k + 16)) for k in range(8)])


def test_heads_have_three_times_their_rows_and_the_module_counts_them() -> None:
    _, _, found = _map("attention")
    (one,) = found.free
    places = {m.name: m.places for m in one.group.members}
    wanted = [[24 * part + 6 * head + k for part in range(3) for k in range(6)]
              for head in range(4)]  # fmt: skip
    assert places["qkv.weight"].tolist() == wanted
    assert [(s.path, s.name) for s in one.known] == [("", "heads")]
    assert [s.value for s in one.settings(3)] == [3]


class Unknown(nn.Module):
    """Channels go through an operation that no rule knows; others do not."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 8)
        self.c, self.d = nn.Linear(8, 10), nn.Linear(10, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.fft.fft(self.a(x)).real
        return self.d(F.relu(self.c(self.b(x))))


def _reasons(module: nn.Module, x: Tensor) -> tuple[list[str], dict[tuple[str, int], str]]:
    torch.manual_seed(0)
    found = map_of(module.eval(), lambda m, dtype: m(x.to(dtype)))
    return [one.group.name for one in found.free], {(f.name, f.dim): f.reason for f in found.frozen}


def test_an_operation_that_is_not_understood_freezes_what_goes_through_it_alone() -> None:
    free, frozen = _reasons(Unknown(), torch.randn(2, 6))
    assert free == ["b.weight", "c.weight"]
    assert "is not understood" in frozen["a.weight", 0]
    assert "output" in frozen["d.weight", 0]
    assert "no channel makes" in frozen["a.weight", 1]


def test_numbers_without_channels_tie_what_they_meet() -> None:
    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            y = self.a(x) * torch.arange(8)  # they differ from channel to channel
            return self.c(torch.relu(self.b(y)) + torch.ones(8))  # these do not

    free, frozen = _reasons(Fixed(), torch.randn(2, 6))
    assert free == []  # the second group holds its number in a constant of the code
    assert "one alone" in frozen["a.weight", 0]
    assert "its code holds their number" in frozen["b.weight", 0]


def test_a_norm_over_channels_keeps_them() -> None:
    class Normed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.norm, self.b = nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 12)
            self.c = nn.Linear(12, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.c(torch.relu(self.b(self.norm(self.a(x)))))

    free, frozen = _reasons(Normed(), torch.randn(2, 6))
    assert free == ["b.weight"]
    assert "native_layer_norm" in frozen["a.weight", 0]


def test_a_norm_of_groups_loses_whole_groups() -> None:
    class Grouped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.norm, self.b = (
                nn.Conv2d(3, 12, 1),
                nn.GroupNorm(4, 12),
                nn.Conv2d(12, 3, 1),
            )

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.norm(self.a(x)))

    torch.manual_seed(0)
    module = Grouped().eval()
    found = map_of(module, lambda m, dtype: m(IMAGE.to(dtype)))
    (one,) = found.free
    assert one.group.count == 4
    small = drawn(module)
    remove(small, [(one.group, [0, 2, 3])], [])
    assert small.norm.num_groups == 3
    assert small.norm.num_channels == small.a.out_channels == small.b.in_channels == 9


def test_slices_keep_places_of_other_groups() -> None:
    module, _, found = _map("dense")
    one = next(f for f in found.free if f.group.name == "layers.0.weight")
    kept = {(s.path, s.dim): s.kept.tolist() for s in slices(module, [(one.group, [1, 4])])}
    assert kept["layers.0.weight", 0] == [1, 4]
    assert kept["layers.1.weight", 1] == [0, 1, 2, 3, 5, 8]
    assert kept["head.weight", 1] == [0, 1, 2, 3, 5, 8, *range(10, 22)]


def test_tied_weights_are_one() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 8)
            self.c.weight = self.b.weight
            self.d = nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.d(self.c(torch.relu(self.b(torch.relu(self.a(x))))))

    torch.manual_seed(0)
    module = Tied().eval()
    found = map_of(module, lambda m, dtype: m(torch.ones(2, 6, dtype=dtype)))
    (one,) = found.free  # rows of the shared weight are its columns too
    assert one.group.count == 8
    small = drawn(module)
    remove(small, [(one.group, [1, 2, 5])], [])
    assert small.c.weight is small.b.weight
    assert (small.c.in_features, small.d.in_features) == (3, 3)


def test_axes_know_what_is_summed() -> None:
    torch.manual_seed(0)
    module = drawn(Residual().eval())
    axes, _ = follow(module, lambda: module(IMAGE.double()))
    summed = {(axes.axes[n].name, axes.axes[n].dim) for n in axes.summed}
    assert summed == {("a.weight", 1), ("b.weight", 1), ("head.weight", 1)}
    groups, frozen = coupled(axes)
    assert len(groups) == 1
    assert {(f.name, f.dim) for f in frozen} >= {("a.weight", 1), ("a.weight", 2), ("head.bias", 0)}


def test_a_drawn_copy_takes_little_memory_and_no_two_parameters_are_alike() -> None:
    class Deep(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(64, 64) for _ in range(30))
            self.last = nn.Linear(64, 64)
            self.last.weight = self.layers[0].weight
            self.norm = nn.BatchNorm1d(64)
            self.register_buffer("table", torch.ones(3, 64))

    module = Deep()
    twin = drawn(module, seed=3)
    held = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
            for t in twin.state_dict().values()}  # fmt: skip
    assert sum(held.values()) < sum(p.numel() for p in module.parameters()) * 8
    assert twin.last.weight is twin.layers[0].weight
    rows = torch.cat([layer.weight.detach() for layer in twin.layers])
    each = rows.reshape(30, 64, 64)
    assert len(each.unique(dim=0)) == 30
    assert all(len(one.unique(dim=0)) == 64 for one in each)
    # A row's products with numbers of variance 1 have about that variance.
    assert 0.5 < float(rows.square().sum(1).mean()) < 2
    assert (twin.norm.running_var > 0).all()
    twin.table.zero_()  # a buffer may be written into; the parameters have other numbers
    assert torch.equal(torch.cat([x.weight.detach() for x in twin.layers]), rows)
    assert torch.equal(module.table, torch.ones(3, 64))
    other = drawn(module, seed=3)
    assert torch.equal(other.layers[7].weight, twin.layers[7].weight)
    assert not torch.equal(drawn(module, seed=4).layers[7].weight, twin.layers[7].weight)
