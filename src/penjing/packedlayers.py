"""Layers that compute straight from packed planes, a few rows at a time.

    y = x W^T with W[rows] = sum over k of scale[k] * z[k] + shift, unpacked where it is used

so that memory holds the stored bits and one block of rows in float32. Where the planes are
rotated x is, too. Convolutions, and layers whose class has a forward of its own, keep their float
weights.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from penjing.model import Model
from penjing.packing import pack_bits, unpack_bits
from penjing.planes import IntegerPlanes
from penjing.scales import RUN, centred, codes_of, steps_of
from penjing.stored import is_shared

__all__ = ["PackedEmbedding", "PackedLinear", "PackedPlanes", "pack_model"]

# Weights unpacked at once: 1 MB of float32, which stays in the cache.
_BLOCK = 1 << 18


class PackedPlanes(nn.Module):
    """A weight [out, in] in its packed form; `rows` gives back some of it.

    Args:
        planes: any; a convolution's weight is its matrix [out, in * h * w].
    """

    tables: Tensor | None
    zero: Tensor | None

    def __init__(self, planes: IntegerPlanes) -> None:
        super().__init__()
        self.out, self.inputs = planes.codes.shape[1], planes.inputs
        self.bits, self.group, self.window = planes.bits, planes.group, planes.window
        self.basis = planes.basis
        self._n = planes.codes.shape[2]
        self._wide = planes.codes.dtype
        self._float = planes.offset == "float"
        for k, (codes, bits) in enumerate(zip(planes.codes, planes.bits, strict=True)):
            self.register_buffer(f"codes{k}", pack_bits(codes, bits))
        self.register_buffer("tables", planes.tables)
        scale = planes.scale[:1] if is_shared(planes.scale) else planes.scale
        self._hold("scale", scale, planes.scale_bits)
        if self._float:
            self._hold("shift", planes.shift.unsqueeze(0), planes.scale_bits, signed=True)
        self.register_buffer("zero", None)
        self._centre = planes.centre
        if planes.offset == "zero":
            self.zero = planes.zero_point.to(torch.uint8)  # [out, groups]

    def _hold(self, name: str, scale: Tensor, bits: int, *, signed: bool = False) -> None:
        step = None
        if bits == 16:
            scale = scale.half()
        elif bits == 8:
            scale, step = codes_of(scale, signed=signed), steps_of(scale, signed=signed)
        self.register_buffer(name, scale.clone())
        self.register_buffer(f"{name}_step", step)

    def _held(self, name: str, rows: Tensor | slice) -> Tensor:
        """Scales [planes, rows, groups] in float32."""
        whole: Tensor = getattr(self, name)
        scale = whole[:, rows].float()
        step: Tensor | None = getattr(self, f"{name}_step")
        if step is None:
            return scale
        out, groups = whole.shape[1:]
        index = torch.arange(out)[rows].unsqueeze(1) * groups + torch.arange(groups)
        return scale * step[:, index // RUN].float()

    def rows(self, rows: Tensor | slice) -> Tensor:
        """Some rows in float32, in the basis of the planes.

        Args:
            rows: a slice, or row numbers int64 [n].

        Returns:
            [n, in].
        """
        codes = self._codes(rows)
        scale = self._held("scale", rows).expand(len(self.bits), -1, -1)
        if self._float:
            shift = self._held("shift", rows)[0]
        elif self.zero is not None:
            shift = -scale[0] * self.zero[rows].float()
        else:
            shift = centred(scale, self._centre)
        return IntegerPlanes(
            codes, tuple(b * self.window for b in self.bits), scale, shift, self.group,
            (codes.shape[1], self.inputs), tables=self.tables,
        ).dequantize()  # fmt: skip

    def _codes(self, rows: Tensor | slice) -> Tensor:
        """Codes [planes, n, places] of some rows; with a window the entries that they make."""
        if self.window > 1:
            wanted = torch.arange(self.out)[rows]
            above = wanted.unsqueeze(1) - torch.arange(self.window - 1, -1, -1)  # [n, window]
            rows = above.clamp_min(0).flatten()
        parts = []
        for k, bits in enumerate(self.bits):
            codes = unpack_bits(getattr(self, f"codes{k}")[rows], bits, self._n)
            if self.window > 1:
                codes = codes.reshape(*above.shape, -1) * (above >= 0).unsqueeze(2)
                late = torch.arange(self.window - 1, -1, -1) * int(bits)
                codes = (codes.to(torch.int32) << late.to(torch.int32)[:, None]).sum(1)
            parts.append(codes.to(torch.int32 if self.window > 1 else self._wide))
        return torch.stack(parts)

    def blocks(self) -> Iterator[slice]:
        """All rows, in slices of about `_BLOCK` weights."""
        each = max(1, _BLOCK // max(self.inputs, 1))
        for start in range(0, self.out, each):
            yield slice(start, min(start + each, self.out))

    @property
    def weight(self) -> Tensor:
        """All of it [out, in], in the basis of the layer."""
        whole = self.rows(slice(None))
        return whole if self.basis is None else self.basis.inverse(whole)

    @property
    def stored_bytes(self) -> int:
        """Bytes of the buffers."""
        return sum(b.nbytes for b in self.buffers())


class PackedLinear(nn.Module):
    """`nn.Linear` on packed planes.

    Args:
        packed: [out, in].
        bias: [out], or None.
    """

    def __init__(self, packed: PackedPlanes, bias: Tensor | None = None) -> None:
        super().__init__()
        self.packed = packed
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
        self.in_features, self.out_features = packed.inputs, packed.out

    @property
    def weight(self) -> Tensor:
        """The whole weight [out, in], unpacked anew each time."""
        return self.packed.weight

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] to [..., out], in the type of `x`."""
        y = x.new_empty(*x.shape[:-1], self.out_features)
        if self.packed.basis is not None:
            x = self.packed.basis.apply(x)
        for rows in self.packed.blocks():
            bias = None if self.bias is None else self.bias[rows].to(x.dtype)
            weight = self.packed.rows(rows).to(x.dtype)  # [rows, in]
            y[..., rows] = nn.functional.linear(x, weight, bias)
        return y


class PackedEmbedding(nn.Module):
    """`nn.Embedding` on packed planes; only the rows that are asked for are unpacked.

    Args:
        packed: [entries, width].
        padding_idx: as `nn.Embedding` has it; it matters in training alone.
    """

    def __init__(self, packed: PackedPlanes, padding_idx: int | None = None) -> None:
        super().__init__()
        self.packed = packed
        self.num_embeddings, self.embedding_dim = packed.out, packed.inputs
        self.padding_idx = padding_idx

    @property
    def weight(self) -> Tensor:
        """The whole table [entries, width], unpacked anew each time."""
        return self.packed.weight

    def forward(self, ids: Tensor) -> Tensor:
        """int [...] to float32 [..., width]."""
        flat = ids.reshape(-1)
        y = torch.empty(len(flat), self.embedding_dim)
        each = max(1, _BLOCK // max(self.embedding_dim, 1))
        for start in range(0, len(flat), each):
            some = slice(start, start + each)
            y[some] = self.packed.rows(flat[some])
        if self.packed.basis is not None:
            y = self.packed.basis.inverse(y)
        return y.reshape(*ids.shape, self.embedding_dim)


def pack_model(model: Model) -> Model:
    """The same network with its quantized linear layers and embeddings on packed planes.

    It is for running: it has no `planes`, and cannot be edited or saved. What is not quantized
    is shared with `model`, which is not changed; drop `model` to free its float weights.

    Args:
        model: its planes decide what is packed; a tied table is packed once.
    """
    tensors = [*model.module.parameters(), *model.module.buffers()]
    names = dict(model.module.named_parameters(remove_duplicate=False))
    owners = {id(names[n]): planes for n, planes in model.planes.items()}
    packed: dict[int, PackedPlanes] = {}
    layers: dict[str, nn.Module] = {}
    # Weights that are packed are not copied: only their places are.
    memo = {id(t): t for t in tensors}
    module = copy.deepcopy(model.module, memo)
    for path, layer in module.named_modules(remove_duplicate=False):
        weight = getattr(layer, "weight", None)
        if id(weight) not in owners or not _is_plain(layer):
            continue
        if id(weight) not in packed:
            packed[id(weight)] = PackedPlanes(owners[id(weight)])
        new: nn.Module
        if isinstance(layer, nn.Embedding):
            new = PackedEmbedding(packed[id(weight)], layer.padding_idx)
        else:
            new = PackedLinear(packed[id(weight)], layer.bias)
        # Quantized inputs and outputs are made by hooks.
        for kind in ("_forward_pre_hooks", "_forward_pre_hooks_with_kwargs", "_forward_hooks"):
            getattr(new, kind).update(getattr(layer, kind))
        for kind in ("penjing_range", "penjing_output"):
            if hasattr(layer, kind):
                setattr(new, kind, getattr(layer, kind))
        layers[path] = new.train(layer.training)
    for path, new in layers.items():
        holder, _, last = path.rpartition(".")
        if holder or last:
            setattr(module.get_submodule(holder), last, new)
    twin = copy.copy(model)
    twin.module = layers.get("", module)
    twin.planes, twin.masks = {}, {}
    return twin


def _is_plain(layer: nn.Module) -> bool:
    if isinstance(layer, nn.Embedding):
        return type(layer).forward is nn.Embedding.forward and layer.max_norm is None
    return isinstance(layer, nn.Linear) and type(layer).forward is nn.Linear.forward
