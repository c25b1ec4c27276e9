"""Options that several verbs share; values are checked before any model is read."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from penjing.errors import InputError, PenjingError, UsageError, printable
from penjing.registry import choices
from penjing.units import parse_ratio, parse_size, parse_time

__all__ = [
    "RATE",
    "RATIO",
    "SIZE",
    "TIME",
    "Leaf",
    "Numbers",
    "check_model",
    "data_option",
    "data_options",
    "descent_options",
    "json_option",
    "learn_options",
    "learning",
    "model_options",
    "not_yet",
    "output_options",
    "set_threads",
    "size_options",
    "targets_option",
    "threads_option",
    "to_option",
    "together",
]

F = TypeVar("F", bound=Callable[..., Any])


class _Quantity(click.ParamType):  # type: ignore[type-arg]
    """Text with a unit, parsed by `penjing.units`."""

    def __init__(self, name: str, parse: Callable[[str], float], positive: bool) -> None:
        self.name, self.parse, self.positive = name, parse, positive

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        if not isinstance(value, str):
            return float(value)
        try:
            number = self.parse(value)
        except PenjingError as error:
            self.fail(str(error), param, ctx)
        if self.positive and number <= 0:
            self.fail(f"got {value!r}; allowed: more than 0", param, ctx)
        return number


class Numbers(click.FloatRange):
    """Numbers of a range; not a number and infinity are none."""

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        number = float(super().convert(value, param, ctx))
        if not math.isfinite(number):
            self.fail(f"got {value!r}; allowed: a finite number", param, ctx)
        return number


SIZE = _Quantity("size", parse_size, positive=True)
TIME = _Quantity("time", parse_time, positive=True)
RATIO = _Quantity("ratio", parse_ratio, positive=False)
RATE = Numbers(0, 1, min_open=True, max_open=True)


class Leaf(click.ParamType):  # type: ignore[type-arg]
    """A name of a leaf family, or `file.py:function` of the user's own."""

    def __init__(self, family: str, *more: str, without: tuple[str, ...] = ()) -> None:
        self.name, self.family, self.more, self.without = "name", family, more, without

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        own = (n for n in choices(self.family) if n not in self.without)
        known = dict.fromkeys([*self.more, *own])
        if ":" not in value and value.replace("_", "-") not in known:
            self.fail(f"got {value!r}; allowed: {', '.join(known)}", param, ctx)
        return str(value)


class _Several(Leaf):
    """Names of one family with commas between them."""

    def convert(  # type: ignore[override]
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[str, ...]:
        if isinstance(value, tuple):
            return value
        parts = [part.strip() for part in value.split(",") if part.strip()]
        return tuple(super(_Several, self).convert(part, param, ctx) for part in parts)


def _existing(_: click.Context, param: click.Parameter, value: str | None) -> str | None:
    if value is not None and not Path(value).exists():
        raise InputError(f"no such file or folder for {param.opts[0]}", got=value)
    return value


def together(*options: Callable[[F], F]) -> Callable[[F], F]:
    """Several options as one decorator, shown in this order."""

    def decorate(function: F) -> F:
        for option in reversed(options):
            function = option(function)
        return function

    return decorate


def not_yet(*names: str) -> Callable[[F], F]:
    """Options whose place is taken but whose work is not done yet."""

    def refuse(_: click.Context, param: click.Parameter, value: object) -> None:
        if value is not None:
            raise UsageError(f"{param.opts[0]} is not there yet", next="leave it out")

    return together(
        *(
            click.option(name, expose_value=False, callback=refuse, hidden=True, metavar="TEXT")
            for name in names
        )
    )


json_option = click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")

model_options = together(
    click.argument("model", metavar="MODEL"),
    click.option(
        "--weights",
        metavar="FILE",
        help="Weights of a factory: .safetensors or .pth; `own` if it loads them itself.",
    ),
    click.option("--allow-pickle", is_flag=True, help="Read pickled weights; they can run code."),
)


def data_option(
    *, required: bool = False, name: str = "--data", help: str = ""
) -> Callable[[F], F]:
    """`--data` or the like: a path that exists."""
    return click.option(name, metavar="PATH", required=required, callback=_existing, help=help)


learn_options = together(
    click.option(
        "--learn",
        type=Leaf("constraints"),
        help="Learn what goes in training, by such a constraint; the criterion is its start.",
    ),
    click.option("--steps", type=click.IntRange(1), help="Of gradient descent.  [default: 200]"),
    click.option(
        "--lr",
        type=RATE,
        help="Learning rate of the gates.  [default: 0.05]",
    ),
    click.option(
        "--weights-lr",
        type=Numbers(0, 1, max_open=True),
        help="Learning rate of the weights; 0 leaves them as they are.  [default: 0]",
    ),
    click.option("--optimizer", help="adamw, sgd or file.py:function.  [default: adamw]"),
    click.option(
        "--loss", type=Leaf("losses", "labels"), help="Default: toward the original's outputs."
    ),
)


def learning(options: dict[str, Any]) -> dict[str, Any]:
    """What was given of `learn_options`, taken out of all options.

    Raises:
        UsageError: an option of the training without the training.
    """
    names = ("learn", "steps", "lr", "weights_lr", "optimizer", "loss")
    given = {name: value for name in names if (value := options.pop(name)) is not None}
    if given and "learn" not in given:
        name = next(iter(given)).replace("_", "-")
        raise UsageError(f"--{name} goes with --learn", next="add --learn gates")
    return given


def descent_options(lr: float) -> Callable[[F], F]:
    """Gradient descent on weights: how many steps, how long each, and by what."""
    return together(
        click.option(
            "--steps", type=click.IntRange(1), help="At the most; without a time, as many as these."
        ),
        click.option("--lr", type=RATE, default=lr, show_default=True, help="Peak learning rate."),
        click.option(
            "--optimizer",
            default="adamw",
            show_default=True,
            help="adamw, sgd, adafactor or file.py:function.",
        ),
    )


threads_option = click.option(
    "--threads", type=click.IntRange(1), help="Default: one for each core."
)

size_options = together(
    click.option(
        "--length",
        type=click.IntRange(1),
        default=128,
        show_default=True,
        help="Tokens a sample, for text.",
    ),
    threads_option,
)


def data_options(
    *, required: bool = False, samples: int = 128, seed: int | None = 0
) -> Callable[[F], F]:
    """Calibration data of a single technique."""
    return together(
        data_option(
            required=required,
            help="Calibration data: .jsonl .csv .parquet .npz or an image folder.",
        ),
        click.option(
            "--samples",
            type=click.IntRange(1),
            default=samples,
            show_default=True,
            help="Calibration samples used, at the most.",
        ),
        size_options,
        click.option("--seed", type=int, default=seed, show_default=seed is not None),
    )


targets_option = click.option(
    "--targets", multiple=True, metavar="GLOB", help="Only layers with such a path; may repeat."
)

to_option = click.option(
    "--to",
    type=_Several("writers", without=("artifact",)),
    default=(),
    metavar="NAME,NAME",
    help="Export too: onnx, openvino, executorch, gguf, compressed-tensors.",
)


def output_options(journal: bool = True) -> Callable[[F], F]:
    """`-o`, `--overwrite`, and where a killed run goes on from."""
    common = together(
        click.option(
            "-o",
            "--output",
            required=True,
            type=click.Path(path_type=Path),
            help="Folder to write; whole or not there.",
        ),
        click.option("--overwrite", is_flag=True, help="Replace an output that exists."),
    )
    if not journal:
        return common
    return together(
        common,
        click.option(
            "--journal",
            type=click.Path(path_type=Path),
            metavar="DIR",
            help="Finished blocks, for a killed run to go on from.  [default: OUTPUT.journal]",
        ),
    )


def check_model(model: str) -> None:
    """Refuse a path that does not exist, before torch is imported.

    Raises:
        InputError: nothing there; `file.py:function` and `module:function` are left to `load`.
    """
    if ":" not in model and not Path(model).exists():
        raise InputError(
            "no such model",
            got=model,
            allowed="a Hugging Face folder, .gguf, file.py:function, a weight file, an artifact",
            next="check the path",
        )
    if source := _factory_of(Path(model)):
        click.echo(
            f"penjing: note: {printable(model)} was made from a factory; "
            f"reading it calls {printable(source)}",
            err=True,
        )


def _factory_of(folder: Path) -> str | None:
    """The function that an artifact's network is built by, if it is one of the user's."""
    try:
        source = json.loads((folder / "structure.json").read_text("utf-8"))["source"]
        return str(source["details"]["factory"]) if source["kind"] == "factory" else None
    except (OSError, ValueError, KeyError, TypeError):  # no artifact, or one that `load` refuses
        return None


def set_threads(threads: int | None) -> None:
    """Let torch use that many threads."""
    if threads is not None:
        import torch

        torch.set_num_threads(threads)
