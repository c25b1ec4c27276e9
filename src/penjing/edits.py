"""Make one edit on a model, and make structural edits again.

`perform` is the only code that changes a module; `replay` makes the structural edits on a
freshly built module (also on the meta device) so that edited weights fit it.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from penjing.cache import CacheGrid, attention_layers
from penjing.convolutions import fold, merge
from penjing.errors import InputError
from penjing.model import Model, parent_of
from penjing.planes import IntegerPlanes
from penjing.recipe import ActivationRange, Edit, Nothing, Patch, Setting, Slice
from penjing.rounding import round_input, round_output
from penjing.shapes import fresh, repair, resize
from penjing.storededits import listed
from penjing.substitutes import LowRank, Zeros, patch_after, patch_before, placed

__all__ = ["perform", "replay"]


def perform(model: Model, edit: Edit) -> None:
    """Make `edit` on `model` in place.

    Raises:
        InputError: the path does not exist or the value does not fit.
    """
    value = edit.value
    if edit.kind == "left":
        model.left[edit.path] = edit.why
        return
    if edit.kind == "curve" and isinstance(value, Tensor):
        losses = [float(f"{loss:.6g}") for loss in value.tolist()]
        model.curves.append({"step": edit.path, "why": edit.why, "losses": losses})
        return
    if edit.kind == "keep" and isinstance(value, Tensor):
        model.kept[edit.path] = value
        return
    if edit.kind in ("mask", "weight", "quantize"):
        parameter = _parameter(model, edit.path)
        shape = tuple(value.shape)  # type: ignore[union-attr]
        if shape != tuple(parameter.shape):
            raise InputError(
                f"{edit.kind} of {edit.path}", got=shape, allowed=tuple(parameter.shape)
            )
        with torch.no_grad():
            if isinstance(value, IntegerPlanes):
                _set(parameter, value.dequantize())
                model.planes[edit.path] = value
            elif edit.kind == "mask" and isinstance(value, Tensor):
                _refuse_quantized(model, "mask", [edit.path])
                _set(parameter, parameter.masked_fill(~value, 0))
                model.masks[edit.path] = value & model.masks.get(edit.path, value)
                model.kept.pop(edit.path, None)
            elif isinstance(value, Tensor):
                _refuse_quantized(model, "weight", [edit.path])
                mask = model.masks.get(edit.path)
                # What was removed stays removed.
                _set(parameter, value if mask is None else value.masked_fill(~mask, 0))
    elif isinstance(value, ActivationRange):
        layer = model.module.get_submodule(edit.path)
        if edit.kind == "output":
            round_output(layer, value)
            model.outputs[edit.path] = value
        else:
            round_input(layer, value)
            model.activations[edit.path] = value
    elif isinstance(value, CacheGrid):
        _fits(model, edit.path, value)
        model.cache[edit.path] = value
    elif isinstance(value, Patch):
        _patch(model, edit, value)
    else:
        touched: list[str] = []
        if edit.kind == "slice":
            touched = [s.path for s in value if isinstance(s, Slice)]  # type: ignore[union-attr]
            touched = [path for path in touched if _is_parameter(model, path)]
            if held := [p for p in model.cache if any(t.startswith(f"{p}.") for t in touched)]:
                raise InputError(
                    f"slice of {held[0]}, whose keys and values are quantized already",
                    next="put cache last in the recipe",
                )
        elif edit.kind == "fold":
            touched = [f"{edit.path}.weight"]
        elif edit.kind == "merge":
            touched = [f"{path}.weight" for path in (edit.path, str(value))]
        elif edit.kind == "untie":
            touched = [edit.path]
        _refuse_quantized(model, edit.kind, touched)
        _restructure(model, _structural(edit))


def _refuse_quantized(model: Model, kind: str, paths: list[str]) -> None:
    for path in paths:
        parameter = _parameter(model, path)
        if any(_parameter(model, name) is parameter for name in model.planes):
            raise InputError(
                f"{kind} of {path}, which is quantized already",
                next="put quantize last in the recipe, or start from an unquantized model",
            )


def _fits(model: Model, path: str, grid: CacheGrid) -> None:
    if path not in attention_layers(model.module).values():
        raise InputError("no attention with a cache", got=path, next="see penjing inspect")
    config = getattr(model.module.get_submodule(path), "config", None)
    names = ("num_key_value_heads", "num_attention_heads")
    heads = next((n for name in names if (n := getattr(config, name, None))), None)
    if heads is not None and len(grid.key_scale) != heads:
        raise InputError(f"heads of the cache of {path}", got=len(grid.key_scale), allowed=heads)


def replay(model: Model, structure: list[dict[str, Any]]) -> None:
    """Make structural edits again on a freshly built module; weights are loaded after."""
    for entry in structure:
        _restructure(model, entry)


def _set(parameter: nn.Parameter, value: Tensor) -> None:
    # In a tensor of its own: the old one may be another copy's too, see `Model.copy`.
    parameter.data = value.to(parameter, copy=True).contiguous()


def _is_parameter(model: Model, path: str) -> bool:
    holder, name = parent_of(model.module, path)
    return name in holder._parameters


def _parameter(model: Model, path: str) -> nn.Parameter:
    holder, name = parent_of(model.module, path)
    found = getattr(holder, name, None)
    if not isinstance(found, nn.Parameter):
        raise InputError("no such parameter", got=path, next="see penjing inspect")
    return found


def _structural(edit: Edit) -> dict[str, Any]:
    entry: dict[str, Any] = {"kind": edit.kind, "path": edit.path}
    if edit.kind == "slice":
        entry |= listed(edit.value)  # type: ignore[arg-type]
    elif isinstance(edit.value, Patch):
        entry |= {"position": edit.value.position, "width": edit.value.weight.shape[0]}
        if edit.value.inner is not None:
            entry["rank"] = len(edit.value.inner)
    elif isinstance(edit.value, Nothing):
        entry |= {"width": edit.value.width, "more": edit.value.more}
    elif edit.kind == "fold":
        entry["norm"] = edit.value
    elif edit.kind == "merge":
        entry["second"] = edit.value
    return entry


def _restructure(model: Model, entry: dict[str, Any]) -> None:
    kind, path = entry["kind"], entry["path"]
    if kind == "slice":
        for name, dim, kept in entry["slices"]:
            resize(model.module, name, dim, torch.tensor(kept, dtype=torch.long))
            if dim == 1:  # its inputs are as was decided
                model.kept.pop(name.rpartition(".")[0], None)
            if (mask := model.masks.get(name)) is not None:
                index = torch.tensor(kept, dtype=torch.long, device=mask.device)
                model.masks[name] = mask.index_select(dim, index)
        repair(model.module, [Setting(*one) for one in entry.get("set", ())])
        fresh(model.module)
    elif kind == "patch":
        block, name = model.module.get_submodule(path), f"penjing_{entry['position']}"
        like = next(block.parameters())
        again = hasattr(block, name)  # two of low rank became one that is not
        kind_of = LowRank if "rank" in entry else nn.Linear
        size = (entry["width"], entry.get("rank", entry["width"]))
        block.add_module(name, kind_of(*size, device=like.device))
        if again:
            pass
        elif entry["position"] == "before":
            block.register_forward_pre_hook(patch_before, with_kwargs=True)
        else:
            block.register_forward_hook(patch_after)
    elif kind == "drop" and "width" in entry:
        _empty(model, path, Nothing(entry["width"], entry["more"]))
    elif kind == "drop":
        _drop(model, path)
    elif kind == "untie":
        _untie(model.module, path)
    elif kind == "fold":
        fold(model.module, path, entry["norm"])
    elif kind == "merge":
        merge(model.module, path, entry["second"])
    else:
        raise InputError("unknown structural edit", got=kind)
    model.structure.append(entry)


def _drop(model: Model, path: str) -> None:
    container, name = parent_of(model.module, path)
    units = list(container.children())
    if not isinstance(container, nn.ModuleList | nn.Sequential) or len(units) < 2:
        raise InputError("only a repeated block can be cut, and one must stay", got=path)
    names = [n for n, _ in container.named_children()]
    index = names.index(name)
    if all(n.isdigit() for n in names):
        del container[index]
    else:  # by index, a Sequential would rename what is left
        delattr(container, name)
    _repair_config(model.module, len(units), index)
    for position, unit in enumerate(container.children()):
        for part in unit.modules():
            if isinstance(getattr(part, "layer_idx", None), int):
                part.layer_idx = position  # type: ignore[assignment]
    prefix = path.rpartition(".")[0]

    def moved(key: str) -> str | None:
        head, rest = key[: len(prefix) + 1], key[len(prefix) + 1 :]
        number, dot, tail = rest.partition(".")
        if head != f"{prefix}.":
            return key
        if number == name:
            return None
        if not (name.isdigit() and number.isdigit()) or int(number) < index:
            return key
        return f"{prefix}.{int(number) - 1}{dot}{tail}"

    for table in _by_path(model):
        kept = {new: v for key, v in table.items() if (new := moved(key)) is not None}
        table.clear()
        table.update(kept)
    model.blocks = tuple(new for b in model.blocks if (new := moved(b)) is not None)


def _empty(model: Model, path: str, nothing: Nothing) -> None:
    """A part of a block gives zeros; the caches of attentions behind one that went move up."""
    holder, name = parent_of(model.module, path)
    inside = [getattr(m, "layer_idx", None) for m in getattr(holder, name).modules()]
    places = [place for place in inside if isinstance(place, int)]
    if places:
        _refuse_mixed(model.module, path)
    setattr(holder, name, Zeros(nothing))
    if places:
        for other, part in model.module.named_modules():
            place = getattr(part, "layer_idx", None)
            if path.startswith(f"{other}.") and place is not None:
                part.layer_idx = None
            elif isinstance(place, int) and place > places[0]:
                part.layer_idx = place - 1
    for table in _by_path(model):
        for key in [k for k in table if k == path or k.startswith(f"{path}.")]:
            del table[key]


def _by_path(model: Model) -> tuple[dict[str, Any], ...]:
    return (model.masks, model.planes, model.activations, model.outputs, model.cache, model.kept)


def _refuse_mixed(module: nn.Module, path: str) -> None:
    for config in (getattr(m, "config", None) for m in module.modules()):
        if len(set(getattr(config, "layer_types", None) or ())) > 1:
            raise InputError(
                f"attention {path} of a network whose layers keep caches of several kinds",
                next="cut whole blocks or MLPs",
            )  # fmt: skip


def _untie(module: nn.Module, path: str) -> None:
    holder, name = parent_of(module, path)
    old = getattr(holder, name)
    setattr(holder, name, nn.Parameter(old.detach().clone(), requires_grad=old.requires_grad))
    configs: list[Any] = [getattr(m, "config", None) for m in module.modules()]
    for config in configs:
        if getattr(config, "tie_word_embeddings", False):
            config.tie_word_embeddings = False


def _repair_config(module: nn.Module, layers: int, index: int) -> None:
    """Depth and per-layer lists of every Hugging Face configuration below `module`."""
    configs = {id(c): c for m in module.modules() if (c := getattr(m, "config", None)) is not None}
    for config in configs.values():
        for name in ("num_hidden_layers", "n_layer", "num_layers"):
            if name in vars(config) and getattr(config, name) == layers:
                setattr(config, name, layers - 1)
        for name, value in list(vars(config).items()):
            if name in ("layer_types", "mlp_layer_types") and isinstance(value, list):
                setattr(config, name, value[:index] + value[index + 1 :])


def _patch(model: Model, edit: Edit, patch: Patch) -> None:
    block, name = model.module.get_submodule(edit.path), f"penjing_{patch.position}"
    old = getattr(block, name, None)
    if old is not None:  # one map in place of two
        there = placed(old, patch.position)
        first, second = (patch, there) if patch.position == "before" else (there, patch)
        bias = second.full @ first.bias + second.bias
        patch = Patch(second.full @ first.full, bias, patch.position)
    if not isinstance(old, nn.Linear):
        _restructure(model, _structural(replace(edit, value=patch)))
    made = block.get_submodule(name)
    inner, outer = (None, made) if isinstance(made, nn.Linear) else (made.inner, made.up)
    with torch.no_grad():
        _set(outer.weight, patch.weight)  # type: ignore[arg-type, union-attr]
        _set(outer.bias, patch.bias)  # type: ignore[arg-type, union-attr]
        if inner is not None and patch.inner is not None:
            _set(inner.weight, patch.inner)  # type: ignore[arg-type, union-attr]
