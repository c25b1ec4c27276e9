"""Widths that modules keep beside their parameters, set right after a parameter lost channels.

Layers of torch say their widths by known attributes. Other modules (attention with a number of
heads) have integers of their own; which of them count what was removed is not known by name, but
found by trying: see `settings`.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from penjing.model import parent_of
from penjing.recipe import Setting

__all__ = ["Owners", "fresh", "owners", "repair", "replace_tensor", "resize", "settings"]

# Modules and names, by the identity of what they have there.
Owners = dict[int, list[tuple[nn.Module, str]]]

# Attributes that are set wherever they count the units, needed or not: others may read them.
_KNOWN = (
    "num_attention_heads", "num_heads", "n_heads", "n_head", "num_key_value_heads",
    "all_head_size", "intermediate_size",
)  # fmt: skip
# Attributes that are tried alone and in pairs; with more, only all together.
_FEW = 8


def owners(module: nn.Module) -> Owners:
    """All modules that have a parameter or buffer, and its names there, by its identity."""
    found: Owners = {}
    for own in module.modules():
        for table in (own._parameters, own._buffers):
            for name, tensor in table.items():
                found.setdefault(id(tensor), []).append((own, name))
    return found


def replace_tensor(where: Owners, old: Tensor, new: Tensor) -> list[tuple[nn.Module, str]]:
    """Put other numbers in the place of a parameter or buffer, under all its names.

    Args:
        where: `owners` of the network; has the new tensor afterwards.

    Returns:
        The modules that have it, and its names there.
    """
    made = nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new
    found = where[id(made)] = where.pop(id(old))
    for own, name in found:
        setattr(own, name, made)
    return found


def resize(
    module: nn.Module, path: str, dim: int, kept: Tensor, where: Owners | None = None
) -> None:
    """Keep some indices of a parameter or buffer, and say so in the layers that have it.

    Args:
        where: `owners` of the network, kept between calls.
    """
    holder, name = parent_of(module, path)
    old = getattr(holder, name)
    new = old.data.index_select(dim, kept.to(old.device))
    for own, key in replace_tensor(owners(module) if where is None else where, old, new):
        _describe(own, key, dim, old.shape[dim], len(kept))


def _describe(layer: nn.Module, name: str, dim: int, before: int, now: int) -> None:
    """Widths of a layer of torch."""
    if isinstance(layer, nn.RNNBase):
        if name.startswith("weight_ih_l0") and dim == 1:
            layer.input_size = now
        elif name.startswith("weight_hh") and dim == 1:
            layer.hidden_size = now
    if name != "weight":
        return
    if isinstance(layer, nn.Linear):
        layer.out_features, layer.in_features = layer.weight.shape
    elif isinstance(layer, _ConvNd):
        turned = isinstance(layer, _ConvTransposeNd)
        if dim == 0 and layer.groups > 1:
            layer.groups = layer.groups * now // before
        first, second = layer.weight.shape[0], layer.weight.shape[1] * layer.groups
        layer.in_channels, layer.out_channels = (first, second) if turned else (second, first)
    elif isinstance(layer, nn.modules.batchnorm._NormBase):
        layer.num_features = now
    elif isinstance(layer, nn.LayerNorm):
        layer.normalized_shape = tuple(layer.weight.shape)
    elif isinstance(layer, nn.GroupNorm):
        layer.num_groups = layer.num_groups * now // before
        layer.num_channels = now
    elif isinstance(layer, nn.Embedding):
        layer.num_embeddings, layer.embedding_dim = layer.weight.shape


def fresh(module: nn.Module) -> nn.Module:
    """The module without what it has made of its parameters and kept (LeViT's attention biases).

    By custom that is forgotten when it is told to train.
    """
    if not module.training:
        module.train()
        module.eval()
    return module


def repair(module: nn.Module, known: list[Setting]) -> None:
    """Set attributes."""
    for one in known:
        setattr(module.get_submodule(one.path), one.name, one.value)


def settings(
    module: nn.Module, parameters: list[str], units: int, kept: int
) -> Iterator[list[Setting]]:
    """Attributes that may count the removed units, likely ones first.

    Integers of the modules above the parameters that are a multiple of the units, and a part of an
    axis that has them. At first those that are called so, then none.
    """
    lengths = {n for path in parameters for n in _find(module, path).shape}
    above: dict[str, nn.Module] = {}
    for path in parameters:
        names = path.split(".")[:-1]
        for depth in range(len(names), -1, -1):
            above.setdefault(".".join(names[:depth]), module.get_submodule(".".join(names[:depth])))
    found = []
    for path, own in sorted(above.items(), key=lambda item: (-item[0].count("."), not item[0])):
        if type(own).__module__.startswith("torch.nn."):
            continue
        for name, value in vars(own).items():
            if type(value) is not int or value % units or value <= 0:
                continue
            if any(length % value == 0 for length in lengths):
                found.append(Setting(path, name, value * kept // units))
    known = [one for one in found if one.name in _KNOWN]
    yield known
    if known:
        yield []
    if not found:
        return
    yield found
    same = {(f.name, f.value): [g for g in found if (g.name, g.value) == (f.name, f.value)]
            for f in found}  # fmt: skip
    alike = list(same.values())[:_FEW]
    for count in (1, 2, 3):
        for some in combinations(alike, count):
            yield [one for part in some for one in part]


def _find(module: nn.Module, path: str) -> Tensor:
    holder, name = parent_of(module, path)
    found: Tensor = getattr(holder, name)
    return found
