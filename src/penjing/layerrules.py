"""What the layers of networks do to the labels of their inputs; see `penjing.axes`.

Products of matrices, convolutions, norms and tables, as the operations that they become.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from penjing.axes import Call, Rule, Seen
from penjing.meeting import FIXED, Letters, Operand, combine, letters_of

__all__ = ["LAYERS"]


def _mm(call: Call) -> None:
    """Products of matrices, and of batches of them; `addmm` with what is added."""
    given = list(zip(call.given, call.before, strict=True))
    added = given.pop(0) if call.name in ("addmm", "baddbmm", "addbmm", "addmv") else None
    (a, sa), (b, sb) = given
    batch = ["b"] * (call.made[0].ndim - 2)
    if call.name in ("mv", "addmv"):
        names_a, names_b, out = ["i", "k"], ["k"], ["i"]
    elif call.name == "dot":
        names_a, names_b, out = ["k"], ["k"], []
    else:
        names_a, names_b, out = [*batch, "i", "k"], [*batch, "k", "j"], [*batch, "i", "j"]
    operands: list[Operand] = [(a, sa, names_a), (b, sb, names_b)]
    fields = combine(call, operands, out, ["k"])
    call.keep(*fields)
    if added is not None:
        _add(call, *added)


def _add(call: Call, tensor: Tensor, seen: Seen, dim: int = -1) -> None:
    """Element by element, a vector or a matrix onto the result."""
    made = call.made[0]
    so_far = call.watch.seen(made)
    names: Letters = letters_of(tensor, made.shape)
    if dim != -1 and tensor.ndim == 1:
        names = [dim]
    fields = combine(call, [(tensor, seen, names), (made, so_far, range(made.ndim))],
                     range(made.ndim))  # fmt: skip
    call.keep(*fields)


def _convolution(call: Call) -> None:
    x, weight, bias = call.args[:3]
    groups, transposed = call.argument("groups"), call.argument("transposed")
    watch, own = call.watch, call.watch.own
    sx, sw = watch.seen(x), watch.seen(weight)
    lead = x.ndim - (weight.ndim - 2)  # without a batch there are no samples
    n = ["n"] * (lead - 1)
    places = [("x", d) for d in range(weight.ndim - 2)]
    kernel = [("k", d) for d in range(weight.ndim - 2)]
    result = [("y", d) for d in range(weight.ndim - 2)]
    sx = Seen(tuple(_one_place(call, one, lead) for one in sx.fields), sx.stored)
    for one in sw.fields:
        if any(size > 1 for size in one.shape[2:]):
            own.freeze(one, "places of a kernel")
    sw = Seen(tuple(f for f in sw.fields if max(f.shape[2:], default=1) == 1), sw.stored)
    if groups == 1:
        names = ["o", "c"] if not transposed else ["c", "o"]
        fields = combine(call, [(x, sx, [*n, "c", *places]), (weight, sw, [*names, *kernel])],
                         [*n, "o", *result], ["c"])  # fmt: skip
    else:
        fields = _grouped(call, x, sx, weight, sw, groups, lead, transposed)
    call.keep(*fields)
    if isinstance(bias, Tensor):
        _add(call, bias, watch.seen(bias), dim=lead - 1)


def _one_place(call: Call, labels: Tensor, lead: int) -> Tensor:
    """A kernel reads a place with those around it: labels of different places are one."""
    for d in range(lead, labels.ndim):
        if labels.shape[d] > 1:
            call.watch.own.tie(labels, d)
            labels = labels.amax(d, keepdim=True)
    return labels


def _grouped(call: Call, x: Tensor, sx: Seen, weight: Tensor, sw: Seen, groups: int, lead: int,
             transposed: bool) -> list[Tensor]:  # fmt: skip
    """A group's inputs and outputs go together; what one of them is made of does not shrink."""
    own = call.watch.own
    made = call.made[0]
    inner = [f for f in sw.fields if f.shape[1] > 1]
    for one in inner:
        own.freeze(one, "channels of one group of a convolution")
    rows = next((f for f in sw.fields if f.shape[0] > 1), None)
    given = next((f for f in sx.fields if f.shape[lead - 1] > 1), None)
    others = [f for f in sx.fields if f is not given]
    if rows is None or given is None:
        for some in (rows, given):
            if some is not None:
                own.freeze(some, FIXED)
        return others
    count_in, count_out = x.shape[lead - 1], made.shape[lead - 1]
    by_in = given.movedim(lead - 1, -1).reshape(-1, groups, count_in // groups)
    flat = rows.reshape(-1)
    if transposed:  # rows are inputs: [in, out / groups, ...]
        by_row = flat.reshape(1, groups, -1)
        own.join(by_in, by_row, FIXED)
        for one in (by_in, by_row):
            own.tie(one, 2)
        out = flat.reshape(groups, -1)[:, :1].expand(groups, count_out // groups).reshape(-1)
    else:
        by_row = flat.reshape(1, groups, -1)
        for one in (by_in, by_row):
            if one.shape[2] > 1:
                own.tie(one, 2)
        own.join(by_in[..., :1], by_row[..., :1], FIXED)
        out = flat
    shape = [1] * made.ndim
    shape[lead - 1] = count_out
    return [*others, out.reshape(shape)]


def _layer_norm(call: Call) -> None:
    x, seen, own = call.given[0], call.before[0], call.watch.own
    shape = call.argument("normalized_shape")
    for one in seen.fields:
        for d in range(x.ndim - len(shape), x.ndim):
            if one.shape[d] > 1:
                own.tie(one, d)
    _affine(call, seen, [call.argument("weight"), call.argument("bias")],
            lambda p: range(x.ndim - p.ndim, x.ndim))  # fmt: skip


def _group_norm(call: Call) -> None:
    x, seen, own = call.given[0], call.before[0], call.watch.own
    groups = call.argument("group") or call.argument("num_groups")
    for one in seen.fields:
        for d in range(2, x.ndim):
            if one.shape[d] > 1:
                own.tie(one, d)
        if one.shape[1] > 1:
            parts = one.movedim(1, -1)
            own.tie(parts.reshape(*parts.shape[:-1], groups, -1), -1)
    weights = [call.argument("weight"), call.argument("bias")]
    _affine(call, seen, weights, lambda p: [1])


def _batch_norm(call: Call) -> None:
    names = ("weight", "bias", "running_mean", "running_var")
    _affine(call, call.before[0], [call.argument(n) for n in names], lambda p: [1])


def _affine(call: Call, seen: Seen, weights: list[Any], where: Callable[[Tensor], Letters]) -> None:
    """A norm's own numbers meet the channels."""
    x = call.given[0]
    operands: list[Operand] = [(x, seen, range(x.ndim))]
    for one in weights:
        if isinstance(one, Tensor):
            operands.append((one, call.watch.seen(one), where(one)))
    fields = combine(call, operands, range(x.ndim))
    call.keep(*fields)
    for tensor in call.made[1:]:
        call.keep(tensor=tensor)


def _embedding(call: Call) -> None:
    table = call.watch.seen(call.args[0])
    if call.watch.seen(call.args[1]).fields:
        call.watch.freeze(call.args[1], "they choose rows of a table")
    kept = []
    for one in table.fields:
        if one.shape[0] > 1:
            call.watch.own.freeze(one, "rows of a table")
        else:
            kept.append(one.reshape([1] * (call.made[0].ndim - 1) + [-1]))
    call.keep(*kept)


LAYERS: dict[str, Rule] = {
    **dict.fromkeys(("mm", "bmm", "addmm", "baddbmm", "mv", "addmv", "dot"), _mm),
    **dict.fromkeys(("convolution", "_convolution"), _convolution),
    **dict.fromkeys(("native_layer_norm", "_fused_rms_norm"), _layer_norm),
    "native_group_norm": _group_norm,
    **dict.fromkeys(
        ("native_batch_norm", "_native_batch_norm_legit_no_training", "cudnn_batch_norm",
         "_native_batch_norm_legit", "batch_norm", "_batch_norm_no_update"), _batch_norm,
    ),
    "embedding": _embedding,
}  # fmt: skip
