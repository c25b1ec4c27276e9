"""What stands in for blocks that go: a linear map at the gap, and the layers that write after it.

The patch is a full ridge regression toward the identity, from the hidden state that reaches the
gap to the one the uncut network had behind it (LinearPatch, arXiv 2505.24680). A low-rank patch
is its reduced-rank regression (Izenman 1975): of (W - I) H^1/2, with H the covariance of what
comes, the largest singular values. Either is kept only where it helps on held-out batches.

Attention sinks, tokens with massive activations (Sun et al., arXiv 2402.17762), are no samples,
and yet a map is applied to them: along their directions S [few, in] it stays what it is held to,

    W = toward + D (I - S^T S),   D fitted to x - S^T S x

or a small error of W, times their size, would undo what attention needs them for.

The layers that write the hidden state behind a gap are refitted where they stand, which costs
nothing at run time: with a the input of such a layer, d what it gives and s the sum that this is
added to,

    W = argmin |W a - (d + s_whole - s)|^2 + ridge toward the old W

so that each takes up what the gap still left behind. Where the network normalises after the
addition s is what enters the norm.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from penjing.calls import Call
from penjing.linalg import affine_ridge, ridge
from penjing.norms import gain_of

__all__ = ["Fit", "Writer", "fit_map", "low_rank", "refit", "sums", "writers_of"]

# A token whose norm is this many times the median is an attention sink, not a sample.
_MASSIVE = 10.0
# Of their energy, the share in the directions that are left alone, and the most of these.
_NEARLY, _DIRECTIONS = 0.999, 8
# Of the ridge toward a layer's own weights.
_HOLD = 0.03
# Samples and places of a call that is run to see how a block hangs together.
_PROBE = (1, 8)


@dataclass(frozen=True)
class Fit:
    """A linear map, and the relative held-out error without and with one fitted to the rest.

    Attributes:
        weight: [out, in].
        bias: [out], zeros where none was asked for.
    """

    weight: Tensor
    bias: Tensor
    before: float
    after: float


@dataclass
class _Sums:
    """Sufficient statistics of a regression y on x."""

    count: int = 0
    tensors: list[Tensor] = field(default_factory=list)

    def add_all(
        self, rows: Sequence[tuple[Tensor, Tensor, Tensor]], toward: Tensor, along: Tensor | None
    ) -> None:
        """Batches of x and y; but for what is along directions [few, in], where there are any."""
        for x, y, _ in rows:
            if along is None:
                self._add(x, y)
            else:
                self._add(x - (x @ along.T) @ along, y - x @ toward.T)

    def _add(self, x: Tensor, y: Tensor) -> None:
        new = [x.double().sum(0), y.double().sum(0), (x.T @ x).double(), (x.T @ y).double()]
        self.tensors = (
            [a + b for a, b in zip(self.tensors, new, strict=True)] if self.count else new
        )
        self.count += len(x)


def fit_map(
    rows: Sequence[tuple[Tensor, Tensor, Tensor]], toward: Tensor, strength: float,
    bias: bool = True,
) -> Fit | None:  # fmt: skip
    """The map of x to y; None where it does not help.

    Whether it does is judged on the last quarter of the batches, of a single batch on the last
    quarter of its rows, by a map fitted to all others; what is kept is fitted to all of them.

    Args:
        rows: x [tokens, in], y [tokens, out] and what is given for y without the map, a batch each.
        toward: [out, in], what the ridge holds to.
        strength: of the ridge, relative to the mean variance of x.
        bias: whether the map has one; then the data are centred.
    """
    calm, sinks = [], []
    for x, y, without in rows:
        massive = _massive(x)
        kept = ~(massive | _massive(y))
        calm.append((x[kept], y[kept], without[kept]))
        sinks.append(x[massive])
    if len(calm) == 1:
        count = len(calm[0][0])
        border = count - count // 4
        calm = [tuple(t[part] for t in calm[0])  # type: ignore[misc]
                for part in (slice(0, border), slice(border, count))]  # fmt: skip
    held = max(1, len(calm) // 4)
    tests, along = calm[-held:], _directions(torch.cat(sinks))
    sums = _Sums()
    sums.add_all(calm[:-held], toward, along)
    if not sums.count:
        return None
    weight, shift = _solved(sums, toward, along, strength, bias)
    total = max(sum(float(y.square().sum()) for _, y, _ in tests), 1e-12)
    before = sum(float((without - y).square().sum()) for _, y, without in tests)
    after = sum(float((x @ weight.T + shift - y).square().sum()) for x, y, _ in tests)
    if after >= before:
        return None
    sums.add_all(tests, toward, along)
    return Fit(*_solved(sums, toward, along, strength, bias), before / total, after / total)


def _massive(x: Tensor) -> Tensor:
    norms: Tensor = x.norm(dim=1)
    found: Tensor = norms > _MASSIVE * norms.median()
    return found


def _directions(sinks: Tensor) -> Tensor | None:
    """Orthonormal [few, in], nearly all that attention sinks are made of."""
    if not len(sinks):
        return None
    _, sizes, directions = torch.linalg.svd(sinks, full_matrices=False)
    shares = sizes.square().cumsum(0) / sizes.square().sum()
    few: Tensor = directions[: min(int((shares < _NEARLY).sum()) + 1, _DIRECTIONS)]
    return few.contiguous()


def _solved(
    sums: _Sums, toward: Tensor, along: Tensor | None, strength: float, bias: bool
) -> tuple[Tensor, Tensor]:
    """Weight [out, in] and bias [out]; toward `toward`, which they are along the directions."""
    sum_x, sum_y, gram, cross = sums.tensors
    held = toward.double() if along is None else torch.zeros_like(toward).double()
    if bias:
        weight, shift = affine_ridge(sums.count, sum_x, sum_y, gram, cross, strength, held)
    else:
        weight = ridge(gram / sums.count, cross / sums.count, strength, held.T).T
        shift = torch.zeros(len(weight), dtype=torch.float64)
    if along is not None:
        weight = toward.double() + weight - (weight @ along.T.double()) @ along.double()
    # Contiguous, as it comes back from a journal: a layout can change the last bit of a product.
    return weight.float().contiguous(), shift.float().contiguous()


def low_rank(weight: Tensor, inputs: Sequence[Tensor], rank: int) -> tuple[Tensor, Tensor]:
    """`up` [width, rank] and `inner` [rank, width], so that x + up inner x is near weight x.

    Args:
        weight: [width, width].
        inputs: x [tokens, width], a batch each.
        rank: at most the width.
    """
    x = torch.cat(list(inputs)).double()
    x = x - x.mean(0)
    values, vectors = torch.linalg.eigh(x.T @ x / len(x))
    values = values.clamp_min(1e-9 * float(values.max())).sqrt()
    change = weight.double() - torch.eye(len(weight), dtype=torch.float64)
    left, *_ = torch.linalg.svd(change @ (vectors * values), full_matrices=False)
    left = left[:, :rank]  # the outputs that matter most; projecting on them is optimal
    return left.float().contiguous(), (left.T @ change).float().contiguous()


@dataclass(frozen=True)
class Writer:
    """A linear layer whose output is added to the hidden state of its block.

    Attributes:
        path: inside the block.
        site: path of the norm that the sum enters, empty for the block's output.
    """

    path: str
    site: str


def writers_of(block: nn.Module, call: Call) -> list[Writer]:
    """The writers of a block in the order they run.

    Found by moving what a layer gives: the sum moves by the same.
    """
    if call.hidden.ndim != 3:
        return []
    call = call.first(*_PROBE)
    width = call.hidden.shape[-1]
    layers = {
        n: m for n, m in block.named_modules()
        if isinstance(m, nn.Linear) and m.out_features == width and "penjing_" not in n
    }  # fmt: skip
    sites = [n for n, m in block.named_modules() if n and gain_of(m) is not None]
    before = _seen(block, call, sites)
    size = float(call.hidden.std())
    found = []
    for path, layer in layers.items():
        move = size * torch.randn(width, generator=torch.Generator().manual_seed(0))
        handle = layer.register_forward_hook(lambda _, a, output, by=move: output + by)
        try:
            after = _seen(block, call, sites)
        finally:
            handle.remove()
        for site in [*sites, ""]:
            if site not in before or after[site].shape != before[site].shape:
                continue
            change = after[site] - before[site]
            if change.shape[-1] == width and torch.allclose(
                change, move.expand_as(change), atol=1e-3 * size
            ):
                found.append(Writer(path, site))
                break
    order = _order(block, call, [w.path for w in found])
    return sorted(found, key=lambda w: order.index(w.path))


def _seen(block: nn.Module, call: Call, sites: Sequence[str]) -> dict[str, Tensor]:
    """What enters the norms, and what the block gives."""
    with _watching(block, sites) as seen:
        output = call.run(block, call.hidden)
    return {name: x for name, (x, _) in seen.items()} | {"": output}


def _order(block: nn.Module, call: Call, paths: Sequence[str]) -> list[str]:
    with _watching(block, paths) as seen:
        call.run(block, call.hidden)
    return list(seen)


@contextlib.contextmanager
def _watching(block: nn.Module, paths: Sequence[str]) -> Iterator[dict[str, tuple[Tensor, Any]]]:
    """Input and output of modules that are called with the input in place."""
    seen: dict[str, tuple[Tensor, Any]] = {}

    def note(_: nn.Module, args: Any, output: Any, path: str) -> None:
        if args:
            seen[path] = (args[0], output)

    handles = [
        block.get_submodule(path).register_forward_hook(lambda m, a, o, p=path: note(m, a, o, p))
        for path in paths
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def refit(
    block: nn.Module, writer: Writer, calls: Sequence[Call], hidden: Sequence[Tensor],
    wanted: Iterable[Tensor], rows: Any,
) -> Fit | None:  # fmt: skip
    """A writer's new weights, so that the sum it is added to is what is wanted.

    Args:
        block: of the cut network, with what was refitted before.
        calls: one a batch.
        hidden: what enters the block, likewise.
        wanted: the sums, likewise, see `sums`.
        rows: (number of a batch, [batch, length, width]) -> [tokens, width].
    """
    layer = block.get_submodule(writer.path)
    found = []
    for number, (call, given, goal) in enumerate(zip(calls, hidden, wanted, strict=True)):
        x, made, total = _at(block, writer, call, given)
        found.append((rows(number, x), rows(number, made + (goal - total)), rows(number, made)))
    weight, bias = layer.get_parameter("weight").detach(), getattr(layer, "bias", None)
    return fit_map(found, weight, _HOLD, bias is not None)


def sums(block: nn.Module, writer: Writer, calls: Sequence[Call]) -> Iterator[Tensor]:
    """What a writer's output adds up to in the whole network's block, one a call."""
    for call in calls:
        yield _at(block, writer, call, call.hidden)[2]


def _at(
    block: nn.Module, writer: Writer, call: Call, given: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """A writer's input, its output, and the sum it goes into."""
    paths = [writer.path, *([writer.site] if writer.site else [])]
    with _watching(block, paths) as seen:
        output = call.run(block, given)
    return (*seen[writer.path], seen[writer.site][0] if writer.site else output)
