"""Counts multiply-accumulates and live bytes of every operation of a forward pass.

    MACs of [m, k] @ [k, n]                       m * k * n
    MACs of a convolution                         outputs * in / groups * kernel
    MACs of attention, q [.., l, e], v [.., s, f] heads * l * s * (e + f)

Each operation belongs to the innermost module that is running. Elementwise multiplications,
norms and activation functions are not counted. A tensor is alive until its storage is freed;
parameters, buffers and scratch space inside a kernel are left out.
"""

from __future__ import annotations

import contextlib
import math
import weakref
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from penjing.errors import UsageError
from penjing.model import Batch, Model

__all__ = ["FORMULAS", "Meter", "hooked", "metered", "sized_batch"]


def _attention(args: tuple[Any, ...], output: Any) -> int:
    query, key, value = args[:3]  # [..., length, width]
    rows: int = math.prod(query.shape[:-1])
    return rows * int(key.shape[-2]) * (int(query.shape[-1]) + int(value.shape[-1]))


def _convolution(args: tuple[Any, ...], output: Any) -> int:
    inputs, weight, transposed = args[0], args[1], args[6]
    # [out, in / groups, kernel...], or [in, out / groups, kernel...] when transposed
    one = math.prod(int(n) for n in weight.shape[1:])
    places: int = math.prod((inputs if transposed else output).shape)
    return places * one


def _product(first: int) -> Callable[[tuple[Any, ...], Any], int]:
    """MACs of a matrix product whose left operand is argument `first`."""
    return lambda args, output: (
        math.prod(args[first].shape)
        * (int(args[first + 1].shape[-1]) if args[first + 1].ndim > 1 else 1)
    )


def _recurrent(args: tuple[Any, ...], output: Any) -> int:
    inputs, to_gates, between = args[0], args[1], args[2]  # [length, batch, in], [gates, in]
    return int(inputs.shape[0] * inputs.shape[1] * (to_gates.numel() + between.numel()))


FORMULAS: dict[str, Callable[[tuple[Any, ...], Any], int]] = {
    "mm": _product(0),
    "bmm": _product(0),
    "mv": _product(0),
    "dot": _product(0),
    "addmm": _product(1),
    "_addmm_activation": _product(1),
    "addmv": _product(1),
    "baddbmm": _product(1),
    "addbmm": _product(1),
    "convolution": _convolution,
    "_convolution": _convolution,
    "mkldnn_rnn_layer": _recurrent,
    "_scaled_dot_product_flash_attention_for_cpu": _attention,
    "_scaled_dot_product_flash_attention": _attention,
    "_scaled_dot_product_efficient_attention": _attention,
    "_scaled_dot_product_cudnn_attention": _attention,
    "_scaled_dot_product_fused_attention_overrideable": _attention,
}


# Tokens of a text where nothing else is asked for.
_USUAL = 128


class Meter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts MACs and live bytes of every operation for the module on top of the stack.

    Args:
        module: its parameters and buffers are not counted as live.
        full_masks: answer yes where the network asks for one bool of a tensor. On the meta
            device tensors have no values; what transformers asks there is whether a mask is
            full and unpacked, and the batch is.

    Attributes:
        macs, calls, peaks: by module path; peaks are bytes.
        peak: bytes of the whole pass.
    """

    def __init__(self, module: nn.Module, *, full_masks: bool = False) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.stack = [""]
        self.macs: Counter[str] = Counter()
        self.calls: Counter[str] = Counter()
        self.peaks: defaultdict[str, int] = defaultdict(int)
        self.live = self.peak = 0
        self._full_masks = full_masks
        self._known: dict[int, weakref.ref[Any]] = {}
        held = [*module.parameters(), *module.buffers()]
        self._constant = {tensor.untyped_storage()._cdata for tensor in held}

    def enter(self, path: str) -> None:
        self.stack.append(path)
        self.calls[path] += 1

    def leave(self, path: str) -> None:
        self.stack.pop()

    def watch(self, tensor: Tensor) -> None:
        """Count the bytes of a tensor's storage until it is freed; views add nothing."""
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._constant or key in self._known:
            return

        def freed(_: object) -> None:
            self.live -= size
            del self._known[key]

        self._known[key] = weakref.ref(storage, freed)
        self.live += size
        self.note()

    def note(self) -> None:
        path = self.stack[-1]
        self.peaks[path] = max(self.peaks[path], self.live)
        self.peak = max(self.peak, self.live)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        name = func.overloadpacket.__name__
        if name == "_local_scalar_dense" and self._full_masks and args[0].dtype == torch.bool:
            return True
        output = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(output):
            if isinstance(leaf, Tensor):
                self.watch(leaf)
        self.note()
        formula = FORMULAS.get(name)
        if formula is not None:
            self.macs[self.stack[-1]] += formula(args, output)
        return output


@contextlib.contextmanager
def hooked(
    module: nn.Module, enter: Callable[[str], None], leave: Callable[[str], None]
) -> Iterator[None]:
    """Call `enter(path)` and `leave(path)` around every module's forward."""
    handles = []
    for path, part in module.named_modules():

        def before(_m: nn.Module, _args: Any, path: str = path) -> None:
            enter(path)

        def after(_m: nn.Module, _args: Any, _output: Any, path: str = path) -> None:
            leave(path)

        handles.append(part.register_forward_pre_hook(before, prepend=True))
        handles.append(part.register_forward_hook(after, always_call=True))
    # The fused transformer layer of torch.nn skips its submodules and their hooks.
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
        for handle in handles:
            handle.remove()


def metered(model: Model, inputs: Batch) -> Meter:
    """The counts of one run; on the meta device nothing is computed."""
    asks = model.source.kind == "huggingface" and model.device.type == "meta"
    meter = Meter(model.module, full_masks=asks)
    with torch.no_grad(), hooked(model.module, meter.enter, meter.leave), meter:
        for tensor in inputs.values():
            meter.watch(tensor)
        model.run(inputs)
    return meter


_USUAL = 128


def sized_batch(model: Model, *, batch: int, length: int | None = None) -> Batch:
    """The model's example repeated to `batch` samples, text to `length` tokens.

    Without a length, 128 tokens or as many as the network takes.

    Raises:
        UsageError: less than 1, or longer than the network's positions.
    """
    limit, text = model.longest, "input_ids" in model.example
    if length is None:
        length = min(_USUAL, limit or _USUAL)
    for name, number in (("batch", batch), ("length", length)):
        if number < 1:
            raise UsageError(f"--{name} is too small", got=number, allowed="1 or more")
    if text and limit is not None and length > limit:
        raise UsageError("the network has no such length", got=length, allowed=f"1 to {limit}")
    inputs = {}
    for name, value in model.example.items():
        rows = torch.arange(batch) % value.shape[0]
        sized = value[rows.to(value.device)]  # [batch, ...]
        if text and value.ndim >= 2:
            columns = torch.arange(length) % value.shape[1]
            sized = sized[:, columns.to(value.device)]  # [batch, length, ...]
        # An example padded by chance would be cheaper than a full batch.
        full = torch.ones_like(sized) if name == "attention_mask" else sized
        inputs[name] = full.to(model.device)
    return inputs
