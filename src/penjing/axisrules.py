"""What each kind of operation does to the labels of its inputs; see `penjing.axes`.

A rule is a function of a `Call`. Operations that torch itself marks as working element by element
need no name here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_map, tree_map_only

from penjing.axes import Axes, Call, Rule, Watch
from penjing.labels import narrowed
from penjing.layerrules import LAYERS
from penjing.meeting import Operand, combine, letters_of

__all__ = ["follow", "rule_of"]

_MANY = 1 << 26  # labels of one tensor

_MOVING = {
    "view", "_unsafe_view", "reshape", "_reshape_alias", "permute", "transpose", "t", "expand",
    "slice", "select", "split", "split_with_sizes", "chunk", "unbind", "cat", "stack", "squeeze",
    "unsqueeze", "index", "index_select", "gather", "roll", "flip", "unfold", "repeat", "narrow",
    "pixel_shuffle", "pixel_unshuffle", "channel_shuffle", "diagonal", "slice_scatter",
    "select_scatter", "constant_pad_nd", "im2col", "repeat_interleave", "take_along_dim",
    "unsafe_split", "unsafe_chunk", "movedim", "unflatten", "flatten", "native_channel_shuffle",
    "index_put", "_index_put_impl",
}  # fmt: skip
# Axes become several, and one axis several parts.
_SPLITTING = {"view", "_unsafe_view", "reshape", "_reshape_alias", "unflatten"}
_SHUFFLING = {"channel_shuffle", "native_channel_shuffle"}
_PARTING = {"split", "split_with_sizes", "chunk", "unsafe_split", "unsafe_chunk"}
# Some of an axis, by numbers that may be others with other inputs.
_CHOOSING = {"index", "index_select", "gather", "take_along_dim"}
_SAME = {
    "clone", "_to_copy", "detach", "alias", "contiguous", "lift_fresh", "tril", "triu", "to",
    "dropout", "_conj", "nan_to_num",
}  # fmt: skip
# Element by element too, though torch does not say so.
_UNMARKED = {"hardswish", "hardsigmoid", "hardtanh", "softplus", "leaky_relu", "elu", "relu6",
             "log_sigmoid_forward", "glu_jvp", "prelu", "_prelu_kernel", "copysign", "logit",
             "threshold", "rrelu_with_noise"}  # fmt: skip
_REDUCING = {
    "sum", "mean", "amax", "amin", "max", "min", "var", "std", "var_mean", "linalg_vector_norm",
    "norm", "logsumexp", "prod", "any", "all", "argmax", "argmin", "cumsum", "cumprod", "_softmax",
    "_log_softmax", "_safe_softmax", "sort", "topk", "median", "logcumsumexp",
}  # fmt: skip
# Places of each channel for itself: axes behind the second are changed.
_PLACES = {
    "max_pool2d_with_indices", "max_pool2d", "avg_pool2d", "_adaptive_avg_pool2d", "avg_pool1d",
    "adaptive_max_pool2d", "upsample_nearest2d", "upsample_bilinear2d", "upsample_bicubic2d",
    "_upsample_bilinear2d_aa", "_upsample_bicubic2d_aa", "upsample_nearest1d", "upsample_linear1d",
    "reflection_pad2d", "reflection_pad1d", "replication_pad2d", "replication_pad1d",
    "_adaptive_avg_pool3d", "max_pool3d_with_indices", "avg_pool3d", "upsample_trilinear3d",
    "grid_sampler_2d", "_upsample_nearest_exact2d", "upsample_nearest3d", "roi_align", "roi_pool",
}  # fmt: skip


def follow(module: nn.Module, run: Callable[[], Any]) -> tuple[Axes, Any]:
    """Labels of all parameters and buffers that a run uses, and their sets; and what it returns.

    Args:
        module: in evaluation mode.
        run: runs it; every tensor in what it returns must stay as it is.
    """
    watch = Watch(module, rule_of)
    with _apart(), watch:
        output = run()
    watch.freeze(output, "the network's output")
    watch.found.settle()
    return watch.found, output


@contextmanager
def _apart() -> Iterator[None]:
    """Operations are taken apart as far as they can be."""
    mkldnn = torch.backends.mkldnn.enabled
    torch.backends.mkldnn.enabled = False  # type: ignore[assignment]
    try:
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mkldnn.enabled = mkldnn


def rule_of(func: Any) -> Rule:
    """The rule of an operation."""
    name = func.overloadpacket.__name__ if hasattr(func, "overloadpacket") else str(func)
    plain = name.rstrip("_") if not name.startswith("__") else name
    if plain in _MOVING:
        return _move
    if plain in _SAME:
        return _same
    if plain in _REDUCING:
        return _reduce
    if plain in _PLACES:
        return _places
    if (own := _RULES.get(plain) or LAYERS.get(plain)) is not None:
        return own
    if torch.Tag.pointwise in getattr(func, "tags", ()) or plain in _UNMARKED:
        return _elementwise
    return Call.unknown


def _move(call: Call) -> None:
    """Do to the labels what is done to the numbers."""
    held, why = _held(call)
    if why:
        call.unknown(why)
        return
    by_id = {id(x): s for x, s in zip(call.given, call.before, strict=True)}
    made: dict[int, list[Tensor]] = {id(x): [] for x in call.made}
    for axes in _supports(call):

        def labels_of(x: Any, axes: frozenset[tuple[int, ...]] = axes) -> Any:
            if not isinstance(x, Tensor) or id(x) in held:
                return x
            own = next((f for f in by_id[id(x)].fields if _support(f) in axes), None)
            whole = torch.full((), -1) if own is None else own
            return whole.expand(x.shape)

        args, kwargs = tree_map(labels_of, (call.args, call.kwargs))
        try:
            result = _moved(call, args, kwargs)
        except (RuntimeError, NotImplementedError, TypeError, ValueError) as error:
            call.unknown(f"{call.name} is not understood ({str(error).splitlines()[0]})")
            return
        for tensor, labels in zip(call.made, result, strict=True):
            made[id(tensor)].append(labels)
            if call.name in _SPLITTING:
                _note_split(call, labels)
            if call.name in _SHUFFLING:
                _note_split(call, args[0].unflatten(1, (call.argument("groups"), -1)))
        if call.name in _PARTING:
            _note_parts(call, result)
    if call.name in _CHOOSING and not all(map(call.watch.fixed, call.given[1:])):
        _freeze_left(call, made[id(call.made[0])])
    for tensor in call.made:
        call.keep(*made[id(tensor)], tensor=tensor)


def _freeze_left(call: Call, chosen: list[Tensor]) -> None:
    """What was not chosen now may be with other inputs."""
    own = call.watch.own
    kept = [x for x in (narrowed(own, one) for one in chosen) if x is not None]
    found = torch.cat([torch.full((1,), -1), *(own.roots(x).reshape(-1) for x in kept)])
    for one in (one for seen in call.before for one in seen.fields):
        roots = own.roots(one)
        own.freeze(roots[~torch.isin(roots, found)], "the input says which of them are taken")


def _held(call: Call) -> tuple[set[int], str]:
    """Tensors that say where numbers go to, which keep their values; why that cannot be done."""
    if call.name.endswith("_"):
        if "put" not in call.name:
            return set(), "changed in place"
        if call.args[0]._base is not None:
            return set(), "written into a part of another tensor"
    if call.argument("accumulate"):
        return set(), f"{call.name} adds"
    places = {x.untyped_storage().data_ptr() for x in call.given}
    if any(x.numel() > _MANY and x.untyped_storage().data_ptr() not in places for x in call.made):
        return set(), f"{call.name} of a very large tensor"
    indices = call.argument("indices") if "index" in call.name else None
    held = {id(x) for x in (*(indices or ()), call.argument("index")) if isinstance(x, Tensor)}
    if any(s.fields and id(x) in held for x, s in zip(call.given, call.before, strict=True)):
        return set(), "channels choose places"
    return held, ""


def _moved(call: Call, args: Any, kwargs: Any) -> list[Tensor]:
    if call.name == "constant_pad_nd":
        args, kwargs = (args[0], args[1], -1), {}
    if call.name == "im2col":  # of floats alone; 2**53 labels are exact
        found = call.func(args[0].double(), *args[1:], **kwargs)
        # A place outside has no label, and would be 0.
        inside = call.func(torch.ones_like(args[0], dtype=torch.float64), *args[1:], **kwargs)
        return [torch.where(inside > 0, found, -1).long()]
    if call.name.endswith("_"):
        args = (args[0].clone(memory_format=torch.contiguous_format), *args[1:])
    try:
        found = call.func(*args, **kwargs)
    except RuntimeError:  # a view of numbers that lie in another order
        if max(x.numel() for x in call.given) > _MANY:
            raise
        args, kwargs = tree_map_only(Tensor, Tensor.contiguous, (args, kwargs))
        found = call.func(*args, **kwargs)
    return list(found) if isinstance(found, list | tuple) else [found]


def _support(labels: Tensor) -> tuple[int, ...]:
    """Axes from the end along which labels change."""
    return tuple(d - labels.ndim for d in range(labels.ndim) if labels.shape[d] > 1)


def _supports(call: Call) -> list[frozenset[tuple[int, ...]]]:
    """Axes that fields change along; fields of different tensors that meet in one are one."""
    found = list(dict.fromkeys(_support(f) for one in call.before for f in one.fields))
    if any(len(one.fields) > 1 for one in call.before):
        return [frozenset([axes]) for axes in found]
    return [frozenset(found)] if found else []


def _note_split(call: Call, labels: Tensor) -> None:
    """An axis of channels became two or more."""
    kept = narrowed(call.watch.own, labels)
    if kept is not None and sum(n > 1 for n in kept.shape) > 1 and bool((kept >= 0).all()):
        call.watch.found.splits.append(kept)


def _note_parts(call: Call, parts: list[Tensor]) -> None:
    """An axis of channels was cut into parts of one length: as many stay in each."""
    kept = [narrowed(call.watch.own, x) for x in parts]
    if all(k is not None and k.shape == kept[0].shape for k in kept):  # type: ignore[union-attr]
        first = kept[0]
        assert first is not None
        if max(first.shape) > 1 and all(bool((k >= 0).all()) for k in kept if k is not None):
            call.watch.found.splits.append(torch.stack([k for k in kept if k is not None]))


def _same(call: Call) -> None:
    call.keep(*call.before[0].fields)


def _elementwise(call: Call) -> None:
    ndim = call.made[0].ndim
    operands: list[Operand] = []
    for tensor, seen in zip(call.given, call.before, strict=True):
        operands.append((tensor, seen, letters_of(tensor, call.made[0].shape)))
    fields = combine(call, operands, range(ndim))
    for tensor in call.made:
        call.keep(*fields, tensor=tensor)


def _reduce(call: Call) -> None:
    x, own = call.given[0], call.watch.own
    if len(call.given) == 2:  # the larger of two, element by element
        _elementwise(call)
        return
    dims = call.argument("dim")
    if dims is None or dims == []:
        dims = range(x.ndim)
    dims = [d % max(x.ndim, 1) for d in ([dims] if isinstance(dims, int) else dims)]
    fields = []
    for one in call.before[0].fields:
        kept = one
        for d in dims:
            if kept.shape[d] > 1:
                own.tie(kept, d)
                kept = kept.narrow(d, 0, 1)
        fields.append(kept)
    left = [d for d in range(x.ndim) if d not in dims]
    for tensor in call.made:
        own_fields = fields
        if tensor.ndim != x.ndim:
            own_fields = [f.reshape([f.shape[d] for d in left]) for f in fields]
        call.keep(*own_fields, tensor=tensor)


def _places(call: Call) -> None:
    x, own = call.given[0], call.watch.own
    fields = []
    lead = x.ndim - _spatial(call)
    for one in call.before[0].fields:
        for d in range(lead, x.ndim):
            if one.shape[d] > 1:
                own.tie(one, d)
                own.freeze(one, f"{call.name} over channels")
                one = one.narrow(d, 0, 1)
        fields.append(one)
    for tensor, seen in zip(call.given[1:], call.before[1:], strict=True):
        if seen.fields:
            call.watch.freeze(tensor, f"{call.name} takes them as places")
    for tensor in call.made:
        call.keep(*fields, tensor=tensor)


def _spatial(call: Call) -> int:
    return next((n for n in (1, 2, 3) if f"{n}d" in call.name), call.given[0].ndim - 2)


def _write(call: Call) -> None:
    """`copy_`: what stands there afterwards is what was written."""
    target, source = call.args[:2]
    if target._base is not None or call.watch.seen(target).fields:
        call.unknown("written into a part of another tensor")
        return
    seen = call.watch.seen(source)
    skip = target.ndim - source.ndim
    call.keep(*(f.reshape([1] * skip + list(f.shape)) for f in seen.fields), tensor=target)


def _constant(call: Call) -> None:
    """Made in the likeness of another: its numbers have no channels."""
    for tensor in call.made:
        call.keep(tensor=tensor)


_RULES: dict[str, Rule] = {
    "copy": _write,
    **dict.fromkeys(
        ("zeros_like", "ones_like", "empty_like", "full_like", "new_zeros", "new_ones", "new_full",
         "new_empty", "fill", "zero", "empty_strided", "new_empty_strided", "rand_like",
         "randn_like"), _constant,
    ),
}  # fmt: skip
