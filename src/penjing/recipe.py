"""Steps plan, edits say what changes, a recipe is a tuple of steps.

A Step looks at one block and yields Edits. Only `penjing.apply` changes a model.
"""

from __future__ import annotations

import dataclasses
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

import tomli_w
import torch
from torch import Tensor

from penjing.cache import CacheGrid
from penjing.errors import InputError

if TYPE_CHECKING:
    from penjing.planes import IntegerPlanes

__all__ = [
    "ActivationRange",
    "Edit",
    "Kind",
    "Nothing",
    "Patch",
    "Recipe",
    "Setting",
    "Slice",
    "Step",
]

Kind = Literal[
    "mask",
    "weight",
    "slice",
    "drop",
    "patch",
    "fold",
    "merge",
    "untie",
    "quantize",
    "activation",
    "output",
    "cache",
    "left",
    "keep",
    "curve",
]


@dataclass(frozen=True, eq=False)
class Slice:
    """Keep these indices of one parameter along one dimension.

    Attributes:
        path: parameter, e.g. `encoder.layer.0.output.dense.weight`.
        dim: dimension of the parameter.
        kept: int64 [kept], ascending.
    """

    path: str
    dim: int
    kept: Tensor


@dataclass(frozen=True)
class Setting:
    """An integer attribute of a module that counts what was removed.

    Attributes:
        path: of the module, empty for the network itself.
    """

    path: str
    name: str
    value: int


@dataclass(frozen=True, eq=False)
class Patch:
    """A linear map on the hidden state.

        y = x @ weight.T + bias,   of low rank   y = x + (x @ inner.T) @ weight.T + bias

    Attributes:
        weight: [width, width], of low rank [width, rank].
        bias: [width].
        position: on the input (`before`) or the output (`after`) of the block at the edit's path.
        inner: None, or [rank, width].
    """

    weight: Tensor
    bias: Tensor
    position: Literal["before", "after"]
    inner: Tensor | None = None

    def __call__(self, x: Tensor) -> Tensor:
        """Of a hidden state [..., width]."""
        if self.inner is None:
            return x @ self.weight.T + self.bias
        return x + (x @ self.inner.T) @ self.weight.T + self.bias

    @property
    def full(self) -> Tensor:
        """[width, width], whatever the rank."""
        if self.inner is None:
            return self.weight
        return torch.eye(len(self.weight)).to(self.weight) + self.weight @ self.inner


@dataclass(frozen=True)
class Nothing:
    """What is left of a half of a block that went: a module that gives zeros.

    Attributes:
        width: of the zeros [..., width].
        more: None, or how many None it gives behind them, in a tuple.
    """

    width: int
    more: int | None = None


@dataclass(frozen=True, eq=False)
class ActivationRange:
    """8-bit unsigned activations: q = clip(round(x / channels / scale) + zero_point, 0, 255).

    Attributes:
        scale: of the whole tensor; 0 for ranges found at run time.
        zero_point: the code of zero.
        channels: float32 [in], what each input channel is divided by first; the layer's weight
            holds its product with it (see `penjing.migration`). None for ones.
    """

    scale: float
    zero_point: int
    channels: Tensor | None = None

    @property
    def key(self) -> tuple[float, int, bytes]:
        """Equal for equal ranges, and hashable."""
        channels = b"" if self.channels is None else self.channels.numpy().tobytes()
        return self.scale, self.zero_point, channels

    @property
    def factor(self) -> Tensor | None:
        """1 / channels, float32 [in]: runtimes multiply."""
        return None if self.channels is None else (1 / self.channels.double()).float()


@dataclass(frozen=True, eq=False)
class Edit:
    """One change of a model, decided but not made.

    Attributes:
        kind: what `value` is:
            mask: bool tensor of the parameter's shape, True is kept;
            weight: new values of the parameter, same shape;
            slice: tuple of `Slice`, every parameter coupled to the removed neurons, and of
                `Setting`, every attribute that counts them;
            drop: None, the block at `path` goes away; or `Nothing`, which takes the place of a
                part of a block;
            patch: `Patch` at the block at `path`;
            untie: None, the parameter at `path` gets a copy of its own;
            curve: float tensor, the losses of a training, each the mean of a part of the way;
                `path` names the step;
            left: None, nothing changes at `path`, and `why` says why;
            keep: bool tensor, what the next step leaves: of a parameter's shape its weights, of
                a layer's inputs, or a single one of a block;
            fold: path of a batch norm that goes into the convolution at `path`;
            merge: path of a convolution that goes into the one in front of it, at `path`;
            quantize: `IntegerPlanes` for the parameter;
            activation: `ActivationRange` for the input of the module at `path`;
            output: the same for its output, without channels;
            cache: `CacheGrid` for the keys and values of the attention at `path`.
        path: dotted path of a parameter (mask, weight, quantize, keep), or of a module.
        value: see `kind`.
        why: a clause for the report.
        note: figures for the report, e.g. the relative error of the layer.
    """

    kind: Kind
    path: str
    value: (
        Tensor
        | tuple[Slice | Setting, ...]
        | Patch
        | Nothing
        | IntegerPlanes
        | ActivationRange
        | CacheGrid
        | str
        | None
    )
    why: str
    note: Mapping[str, float] = field(default_factory=dict)


class Step(Protocol):
    """One technique with its configuration; a frozen dataclass whose fields are its options.

    Class attributes:
        name: the verb, also the table name in a recipe.
        needs: statistics wanted of each layer (`penjing.layerstats`): any of `gram`, `cross`,
            `range`, `size`, `gradient`.
    """

    name: ClassVar[str]
    needs: ClassVar[frozenset[str]]
    targets: tuple[str, ...]

    def plan(self, block: Any, stats: Any) -> Iterator[Edit]:
        """Yield the edits of one block, given the statistics of its inputs."""
        ...


@dataclass(frozen=True)
class Recipe:
    """A tuple of steps that can be written, read and replayed."""

    steps: tuple[Any, ...]
    seed: int = 0

    def to_toml(self) -> str:
        """The recipe as TOML: one `[[step]]` table each, defaults included."""
        tables = []
        for step in self.steps:
            fields = {f.name: getattr(step, f.name) for f in dataclasses.fields(step)}
            plain = {k: list(v) if isinstance(v, tuple) else v for k, v in fields.items()}
            tables.append({"do": step.name} | {k: v for k, v in plain.items() if v is not None})
        return tomli_w.dumps({"seed": self.seed, "step": tables})

    @staticmethod
    def from_toml(text: str, steps: Mapping[str, type]) -> Recipe:
        """Read what `to_toml` wrote.

        Args:
            text: TOML.
            steps: step classes by verb.

        Raises:
            InputError: not TOML, an unknown verb or an unknown option.
        """
        try:
            table = tomllib.loads(text)
        except tomllib.TOMLDecodeError as error:
            raise InputError("the recipe is not TOML", got=error) from error
        built = []
        for index, entry in enumerate(table.get("step", ())):
            verb = entry.pop("do", None)
            if verb not in steps:
                raise InputError(
                    f"unknown step {index + 1} in the recipe", got=verb, allowed=", ".join(steps)
                )
            known = {f.name for f in dataclasses.fields(steps[verb])}
            if surplus := sorted(set(entry) - known):
                raise InputError(
                    f"step {verb} has no option {surplus[0]}", allowed=", ".join(sorted(known))
                )
            options = {k: tuple(v) if isinstance(v, list) else v for k, v in entry.items()}
            built.append(steps[verb](**options))
        # `step = []` is what an unedited network's recipe says; without the name it is no recipe.
        if "step" not in table:
            raise InputError("the recipe has no [[step]]")
        return Recipe(tuple(built), int(table.get("seed", 0)))
