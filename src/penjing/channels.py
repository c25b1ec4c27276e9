"""Which layers write and read the same channels, found by running the network.

A set of tensors shares channels when the operations between them let a positive factor of each
channel through, f(s x) = s f(x): additions, ReLU and leaky ReLU, padding with zeros, pooling,
means over places, views that keep the channels apart. Layers whose outputs are in the set write
it, layers whose inputs are in it read it, and

    writers W -> W / s,  b -> b / s;   readers W -> W s

leaves the network as it was. A set with any other operation at it (ReLU6, GELU, a product of two
tensors), with an input or the output of the network, or with a layer that runs twice, is not free
and is left out.

In transformers channels are the last dimension, what writes them may be a norm, and between
writer and reader there is attention or a gate. `last_channels` takes two kinds of sets: a norm and
the linear layers that read what it gives; and a linear layer with a later one each of whose inputs
depends on one output of the first (values and output projection, where several heads may read one
head of values; the layers of an MLP, or its gated branch). Whether a factor passes is then proved:
with 1/s behind the writer and s before the readers the same must come out. GELU, a residual stream
around a norm, another reader do not stand that.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from penjing.model import Model
from penjing.norms import gain_of
from penjing.tensorsets import TensorSets

__all__ = ["Channels", "last_channels", "shared_channels"]

_AFTER_EACH_OTHER = {
    "relu", "leaky_relu", "alias", "detach", "clone", "add", "constant_pad_nd", "mean",
    "max_pool2d_with_indices", "avg_pool2d", "_adaptive_avg_pool2d", "view", "_unsafe_view",
    "reshape", "squeeze",
}  # fmt: skip


@dataclass(frozen=True)
class Channels:
    """One set.

    Attributes:
        count: channels.
        writers: paths of the layers (or of the norm) that write them, in the order they run.
        readers: paths of the layers that read them, likewise.
        columns: the channel of each input of the readers, where it is not its own number.
    """

    count: int
    writers: tuple[str, ...]
    readers: tuple[str, ...]
    columns: tuple[int, ...] = ()


def shared_channels(model: Model) -> list[Channels]:
    """The free sets with at least one writer and one reader, in the order of their writers.

    Layers are `nn.Conv2d` and, behind the places, `nn.Linear`.
    """
    watch = _Watch()
    handles = []
    for name, module in model.module.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            handles.append(module.register_forward_pre_hook(watch.enter(name), prepend=True))
            handles.append(module.register_forward_hook(watch.leave(name)))
    inputs = [x for x in model.example.values() if isinstance(x, Tensor)]
    try:
        with torch.no_grad(), watch:
            output = model.run(model.example)
    finally:
        for handle in handles:
            handle.remove()
    for tensor in (*inputs, output):
        watch.close(tensor)
    owners: dict[int, list[str]] = {}
    for name, parameter in model.module.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(name.rpartition(".")[0])
    for names in owners.values():  # a weight that two layers share
        for name in names if len(names) > 1 else ():
            watch.freeze(name)
    return watch.found()


class _Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Tensors of one run, joined where channels pass from one to the other."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._sets = TensorSets("nothing that was seen made it: a constant, or an input")
        self._inside: str | None = None
        self._writes: list[tuple[str, Tensor]] = []
        self._reads: list[tuple[str, Tensor]] = []

    def close(self, tensor: Tensor) -> None:
        """Its channels must stay as they are."""
        self._sets.close(tensor, "it must stay as it is")

    def freeze(self, name: str) -> None:
        """The layer must stay as it is."""
        for layer, tensor in (*self._writes, *self._reads):
            if layer == name:
                self.close(tensor)

    def enter(self, name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            self._sets.top(args[0])
            self._reads.append((name, args[0]))
            self._inside = name

        return hook

    def leave(self, name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            self._inside = None
            self._sets.new(output)
            self._writes.append((name, output))
            flat = isinstance(module, nn.Linear)
            for tensor in (args[0], output):
                if tensor.ndim != (2 if flat else 4):
                    self.close(tensor)

        return hook

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if self._inside is not None:  # the layer as a whole is known
            return result
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        made = [x for x in tree_leaves(result) if isinstance(x, Tensor)]
        passes = _passes(func, args, given, made)
        for tensor in given:
            self._sets.top(tensor)
        for tensor in made:
            self._sets.new(tensor)
        if passes:
            for tensor in given:
                self._sets.join(made[0], tensor)
        else:
            for tensor in (*given, *made):
                self.close(tensor)
        return result

    def found(self) -> list[Channels]:
        """What is free."""
        names = [[n for n, _ in side] for side in (self._writes, self._reads)]
        for name in {n for n in names[0] if names[0].count(n) > 1}:
            self.freeze(name)
        sets: dict[int, tuple[list[str], list[str]]] = {}
        widths: dict[int, int] = {}
        for index, side in enumerate((self._writes, self._reads)):
            for name, tensor in side:
                top = self._sets.top(tensor)
                if not self._sets.reason(top):
                    sets.setdefault(top, ([], []))[index].append(name)
                    widths[top] = tensor.shape[1]
        return [Channels(widths[t], tuple(w), tuple(r)) for t, (w, r) in sets.items() if w and r]


def _passes(func: Any, args: Any, given: list[Tensor], made: list[Tensor]) -> bool:
    """Whether a factor of each channel passes from all of `given` to the first of `made`."""
    name = func.overloadpacket.__name__.removesuffix("_") if func is not None else ""
    if name not in _AFTER_EACH_OTHER or not given or not made:
        return False
    result = made[0]
    if result.ndim < 2:
        return False
    if any(x.ndim < 2 or x.shape[1] != result.shape[1] for x in (*given, result) if x.ndim):
        return False
    if any(not x.ndim for x in given):
        return False
    if name == "add":  # of two tensors; a number added is no factor
        return len(given) == 2 and all(x.shape[2:] == result.shape[2:] for x in given)
    if name == "constant_pad_nd":  # of places, with zeros
        return len(args[1]) <= 2 * (result.ndim - 2) and (len(args) < 3 or args[2] == 0)
    if name == "mean":
        return len(args) > 1 and not {0, 1, -given[0].ndim, 1 - given[0].ndim} & set(args[1])
    if name in ("view", "_unsafe_view", "reshape", "squeeze"):
        # Rows and channels first, as they were.
        return bool(given[0].shape[:2] == result.shape[:2])
    return True


def last_channels(
    module: nn.Module,
    run: Callable[[], Tensor],
    readers: Collection[str],
    writers: Collection[str],
) -> list[Channels]:
    """Sets of channels in the last dimension whose factors pass, each reader in one set.

    Args:
        module: the network, or a block; stays as it is. In float64 what is found is surest.
        run: runs it on a sample that it always gives the same output for.
        readers: paths of the linear layers that may read.
        writers: paths of the linear layers that may write; norms are found.
    """
    layers = {n: m for n, m in module.named_modules() if isinstance(m, nn.Linear)}
    norms = {n: m for n, m in module.named_modules() if n not in layers and gain_of(m) is not None}
    seen: list[tuple[str, Tensor, Tensor]] = []

    def note(name: str) -> Any:
        def hook(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            if args:
                seen.append((name, args[0], output))

        return hook

    with _hooks([(m.register_forward_hook, note(n)) for n, m in (layers | norms).items()]):
        output = run()
    names = [name for name, *_ in seen]
    seen = [one for one in seen if names.count(one[0]) == 1]
    probe = _Probe(layers | norms, run, output)
    found: list[Channels] = []
    for place, (name, x, y) in enumerate(seen):
        if name in norms:
            own = tuple(n for n, given, _ in seen if n in layers and _is(given, y))
            sets = [Channels(y.shape[-1], (name,), own)] if own else []
        elif name in readers and not any(name in one.readers for one in found):
            makers = [n for n, _, made in seen[:place] if n in writers and _fits(made, x)]
            sets = [pair for n in makers if (pair := probe.pair(n, name)) is not None]
        else:
            continue
        found += [s for s in sets if set(s.readers) <= set(readers) and probe.passes(s)][:1]
    return found


def _is(one: Tensor, other: Tensor) -> bool:
    """The same numbers, maybe by a view."""
    return one is other or (one.data_ptr() == other.data_ptr() and one.shape == other.shape)


def _fits(made: Tensor, read: Tensor) -> bool:
    wide, narrow = read.shape[-1], made.shape[-1]
    return narrow > 1 and wide % narrow == 0


class _Stop(Exception):
    pass


@contextmanager
def _hooks(wanted: list[tuple[Callable[[Any], Any], Any]]) -> Iterator[None]:
    handles = [register(hook) for register, hook in wanted]
    try:
        with torch.no_grad():
            yield
    finally:
        for handle in handles:
            handle.remove()


class _Probe:
    """Runs with something changed behind one layer.

    Args:
        modules: layers and norms by path.
        run: gives the output.
        output: what it gives unchanged.
    """

    def __init__(
        self, modules: dict[str, nn.Module], run: Callable[[], Tensor], output: Tensor
    ) -> None:
        self._modules, self._run, self._output = modules, run, output
        eps = torch.finfo(output.dtype).eps
        # Factors are powers of two, which cost no digit; sums may be made in another order.
        self._same, self._other = 100 * eps, 1000 * eps

    def passes(self, own: Channels) -> bool:
        """Whether 1/s behind the writer and s before the readers change nothing."""
        generator = torch.Generator().manual_seed(0)
        power = torch.randint(-3, 4, (own.count,), generator=generator)
        s = torch.exp2(power.to(self._output.dtype)).to(self._output.device)
        wide = s[list(own.columns)] if own.columns else s
        hooks: list[tuple[Callable[[Any], Any], Any]] = [
            (self._modules[own.writers[0]].register_forward_hook, lambda m, a, y: y / s)
        ]
        hooks += [
            (self._modules[n].register_forward_pre_hook, lambda m, a: (a[0] * wide, *a[1:]))
            for n in own.readers
        ]
        with _hooks(hooks):
            off = (self._run() - self._output).abs().max()
        return bool(off <= self._same * self._output.abs().max())  # NaN is not

    def pair(self, writer: str, reader: str) -> Channels | None:
        """The set of two layers, where each input of the reader depends on one channel alone.

        Every bit of the channels' numbers is asked twice: by a change of the channels that have
        it, and by one of the others.
        """
        base = self._input(writer, reader, None)
        if base is None:
            return None
        count = int(self._modules[writer].out_features)  # type: ignore[arg-type]
        number = torch.arange(count)
        columns = torch.zeros(base.shape[-1], dtype=torch.int64)
        for bit in range((count - 1).bit_length()):
            has = (number >> bit) % 2 == 1
            one, other = (self._touched(writer, reader, base, some) for some in (has, ~has))
            if one is None or other is None or not bool((one ^ other).all()):
                return None
            columns += one.long() << bit
        if not bool((columns < count).all()):
            return None
        own = tuple(columns.tolist())
        plain = own == tuple(range(count))
        return Channels(count, (writer,), (reader,), () if plain else own)

    def _touched(self, writer: str, reader: str, base: Tensor, some: Tensor) -> Tensor | None:
        now = self._input(writer, reader, some)
        if now is None or now.shape != base.shape:
            return None
        off = (now - base).abs().reshape(-1, base.shape[-1]).amax(0)  # [in]
        return (off > self._other * base.abs().max()).cpu()

    def _input(self, writer: str, reader: str, some: Tensor | None) -> Tensor | None:
        """The reader's input with noise on some channels of the writer."""
        kept: list[Tensor] = []

        def disturb(_: nn.Module, args: Any, output: Tensor) -> Tensor:
            if some is None:
                return output
            rows = output.reshape(-1, output.shape[-1])
            generator = torch.Generator().manual_seed(0)
            noise = 1 + torch.rand(rows.shape, generator=generator, dtype=output.dtype)
            # Up and down, and past zero from wherever a channel is: a ReLU must not hide it.
            noise[1::2] *= -1
            noise = noise * (1 + rows.abs().max()) * some
            return output + noise.reshape(output.shape)

        def keep(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            kept.append(args[0])
            raise _Stop

        writing, reading = self._modules[writer], self._modules[reader]
        pairs: list[tuple[Callable[[Any], Any], Any]] = [
            (writing.register_forward_hook, disturb), (reading.register_forward_pre_hook, keep),
        ]  # fmt: skip
        with _hooks(pairs):
            try:
                self._run()
            except _Stop:
                return kept[0]
        return None
