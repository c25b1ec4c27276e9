"""Model: a torch module with what is needed to run it, to rebuild it and to edit it."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from penjing import bitmask, sparsecodes
from penjing.cache import CacheGrid, rounding_cache
from penjing.errors import InputError
from penjing.planes import IntegerPlanes
from penjing.recipe import ActivationRange, Recipe

__all__ = ["Batch", "Interface", "Model", "Source", "parent_of"]

Batch = dict[str, Tensor]
Interface = Literal["embedding", "classifier", "causal", "image", "tensor", "weights"]


@dataclass(frozen=True)
class Source:
    """Where a model came from and how to build its empty module again.

    Attributes:
        kind: reader that made it: `huggingface`, `gguf`, `factory`, `weights`.
        path: as the user gave it.
        fingerprint: SHA-256 over the weight files.
        details: JSON-ready, what the reader needs to rebuild (class, config, pooling, factory).
        assets: files to copy into an artifact as they are (tokenizer, preprocessing).
    """

    kind: str
    path: str
    fingerprint: str
    details: Mapping[str, Any] = field(default_factory=dict)
    assets: tuple[Path, ...] = ()


# What is known of a network besides its module: a copy has its own.
_KNOWN = ("masks", "planes", "activations", "outputs", "cache", "kept", "left", "curves",
          "structure")  # fmt: skip


def parent_of(module: nn.Module, path: str) -> tuple[nn.Module, str]:
    """The module that holds `path`, and the last name of `path`."""
    head, _, name = path.rpartition(".")
    return module.get_submodule(head), name


@dataclass
class Model:
    """A network and everything Penjing knows of it.

    Attributes:
        module: the torch module, in eval mode; its parameters are what would be computed
            with (quantized weights are held dequantized, `planes` has the integers).
        interface: how inputs become the one output tensor, see `run`.
        example: a small valid batch, batch dimension first.
        source: how to rebuild the unedited module.
        blocks: paths of the repeated units in execution order.
        tokenizer: a `transformers` tokenizer for text models, else None.
        preprocess: image -> float32 array [channels, height, width] for image models, else None.
        masks: kept connections by parameter path, bool, of the parameter's shape.
        planes: quantized weights by parameter path.
        activations: 8-bit input ranges by module path.
        outputs: 8-bit output ranges, likewise.
        cache: how keys and values are stored, by path of an attention; empty for floats.
        kept: what a step chose to keep, for the next one to take away the rest: bool, by path of
            a parameter, of a layer (its inputs) or of a block.
        left: why a step left a layer as it was, by path, for who asked for it.
        curves: JSON-ready, of each training its `step`, `why` and `losses` from first to last.
        structure: JSON-ready structural edits in the order made; replayed by readers.
        recipe: the steps that were applied since it was loaded.
    """

    module: nn.Module
    interface: Interface
    example: Batch
    source: Source
    blocks: tuple[str, ...] = ()
    tokenizer: Any = None
    preprocess: Any = None
    masks: dict[str, Tensor] = field(default_factory=dict)
    planes: dict[str, IntegerPlanes] = field(default_factory=dict)
    activations: dict[str, ActivationRange] = field(default_factory=dict)
    outputs: dict[str, ActivationRange] = field(default_factory=dict)
    cache: dict[str, CacheGrid] = field(default_factory=dict)
    kept: dict[str, Tensor] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)
    curves: list[dict[str, Any]] = field(default_factory=list)
    structure: list[dict[str, Any]] = field(default_factory=list)
    recipe: Recipe | None = None

    def run(self, batch: Mapping[str, Tensor]) -> Tensor:
        """The network's one output tensor, float32.

        embedding: `input_ids`, `attention_mask` [batch, length] -> pooled [batch, width]
        classifier: the same -> logits [batch, classes]
        causal: the same -> logits [batch, length, vocabulary]
        image: `pixel_values` [batch, channels, height, width] -> logits [batch, classes]
        tensor: the inputs of `example` in order, as positional arguments -> any tensor
        """
        if self.interface == "weights":
            raise InputError("a bare weight file cannot be run", got=self.source.path)
        if self.interface == "tensor":
            output = self.module(*(batch[name] for name in self.example))
        elif self.interface == "image" and self.source.kind == "factory":
            output = self.module(batch["pixel_values"])
        elif self.interface == "causal":
            inputs: dict[str, Any] = {name: batch[name] for name in self.example}
            if self.cache:  # rounds keys and values, and keeps none
                inputs["past_key_values"] = rounding_cache(self.module, self.cache, store=False)
            output = self.module(**inputs, use_cache=bool(self.cache))
        else:
            output = self.module(**{name: batch[name] for name in self.example})
        if self.interface == "embedding":
            hidden = output.last_hidden_state  # [batch, length, width]
            return pool(hidden, batch["attention_mask"], self.source.details.get("pooling", "mean"))
        return output.float() if isinstance(output, Tensor) else output.logits.float()

    @property
    def longest(self) -> int | None:
        """Most tokens of an input, None where the configuration does not say."""
        count = getattr(getattr(self.module, "config", None), "max_position_embeddings", None)
        if not isinstance(count, int):
            return None
        for name, table in self.module.named_modules():
            # RoBERTa counts positions from behind the padding's.
            if name.endswith("position_embeddings") and isinstance(table, nn.Embedding):
                return count - (0 if table.padding_idx is None else table.padding_idx + 1)
        return count

    def at_most(self, length: int) -> int:
        """`length` tokens, or as many as the network takes."""
        return min(length, self.longest or length)

    @property
    def is_image(self) -> bool:
        """Whether the inputs are images."""
        return "pixel_values" in self.example

    @cached_property
    def gives_numbers(self) -> bool:
        """Whether a sample's output is one number: a regression, or a score. Runs it once."""
        if self.interface in ("causal", "embedding", "weights"):
            return False
        with torch.no_grad():
            output = self.run(self.example)
        return output.numel() == len(output)

    @property
    def suited_loss(self) -> str:
        """Of `penjing.losses`: cosine for embeddings, kl for logits, mse for single numbers."""
        if self.interface == "embedding":
            return "cosine"
        return "mse" if self.gives_numbers else "kl"

    def copy(self, *, shared: bool = False) -> Model:
        """An independent copy; the original of every experiment.

        Args:
            shared: parameters keep the numbers they have in common until an edit replaces them,
                which takes no memory; for copies that edits alone change.
        """
        # What is known of networks of the same shapes is shared by all copies.
        for known in ("_channels", "_groups"):
            vars(self).setdefault(known, {})
        twin = copy.copy(self)
        memo: dict[int, nn.Parameter] = {}
        if shared:
            own = self.module.parameters()
            memo = {id(p): nn.Parameter(p.detach(), p.requires_grad) for p in own}
        twin.module = copy.deepcopy(self.module, memo)
        for name in _KNOWN:
            setattr(twin, name, (copy.copy if shared else copy.deepcopy)(getattr(self, name)))
        return twin

    def parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Named parameters, a tied one once under its first name."""
        return self.module.named_parameters(remove_duplicate=True)

    def state(self) -> dict[str, Tensor]:
        """Tensors of the state dict, a tied one once under its first name."""
        again = {name for group in self.tied() for name in group[1:]}
        return {n: t for n, t in self.module.state_dict().items() if n not in again}

    @property
    def parameter_count(self) -> int:
        """Weights of the network, tied ones once."""
        return sum(p.numel() for _, p in self.parameters())

    def tied(self) -> list[tuple[str, ...]]:
        """Groups of parameter names that share one tensor."""
        names: dict[int, list[str]] = {}
        for name, parameter in self.module.named_parameters(remove_duplicate=False):
            names.setdefault(id(parameter), []).append(name)
        return [tuple(group) for group in names.values() if len(group) > 1]

    def stored_bits(self) -> float:
        """Stored bits per weight; scales of quantized weights and bitmasks of pruned ones count."""
        total = sum(self.stored_bytes(name) for name, _ in self.parameters())
        return 8 * total / max(self.parameter_count, 1)

    def stored_bytes(self, name: str) -> int:
        """Bytes of one parameter in an artifact."""
        sparse, planes = self.is_sparse(name), self.planes.get(name)
        if planes is not None:
            return sparsecodes.stored_bytes(planes) if sparse else planes.stored_bytes
        parameter = self.module.get_parameter(name)
        dense = parameter.numel() * parameter.element_size()
        return bitmask.stored_bytes(parameter) if sparse else dense

    def is_sparse(self, name: str) -> bool:
        """Whether an artifact stores only what is no zero of this parameter, with a bitmask."""
        if name not in self.masks:
            return False
        planes = self.planes.get(name)
        if planes is not None:
            return sparsecodes.pays(planes)
        return bitmask.pays(self.module.get_parameter(name))

    @property
    def device(self) -> torch.device:
        """Device of the first parameter."""
        return next(self.module.parameters()).device


def pool(hidden: Tensor, attention_mask: Tensor, kind: str) -> Tensor:
    """[batch, length, width] to [batch, width]: `mean` of unmasked tokens, or `cls`, the first."""
    if kind == "cls":
        return hidden[:, 0].float()
    kept = attention_mask.unsqueeze(-1).to(hidden.dtype)  # [batch, length, 1]
    return ((hidden * kept).sum(1) / kept.sum(1).clamp_min(1e-9)).float()
