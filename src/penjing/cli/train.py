"""Training after an edit: recover."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from penjing.cli.options import (
    TIME,
    Leaf,
    Numbers,
    data_options,
    descent_options,
    json_option,
    model_options,
    output_options,
    to_option,
)
from penjing.cli.work import technique
from penjing.errors import PenjingError, UsageError

__all__ = ["recover"]

# Seconds that are kept free for the end: for starting to write, for each byte, a share of all; and
# as long as reading took, which says how fast this machine is now.
_STARTS, _BYTE, _SHARE = 1.5, 2e-8, 0.02

_SCHEDULES = ("cosine", "linear", "constant", "one-cycle")


@click.command()
@model_options
@click.option("--within", type=TIME, metavar="10m", help="Time this command may take.")
@click.option("--seconds", type=TIME, help="Training time.  [default: 60s]")
@descent_options(lr=1e-4)
@click.option("--loss", type=Leaf("losses", "labels"), help="Default: what fits the output.")
@click.option(
    "--hidden",
    type=Numbers(0),
    metavar="W",
    help="Weight of the distance of hidden states.  [default: 0]",
)
@click.option("--codes", is_flag=True, default=None, help="Learn the integers of weights too.")
@click.option(
    "--block-steps", type=click.IntRange(1), help="Steps on each block before those on the whole."
)
@click.option("--rank", type=click.IntRange(1), help="Low-rank changes of matrices, merged.")
@click.option("--schedule", type=click.Choice(_SCHEDULES), help="Of --lr.  [default: cosine]")
@click.option(
    "--warmup",
    type=Numbers(0, 1, max_open=True),
    help="Share of the way in which --lr rises.  [default: 0.05]",
)
@click.option("--clip", type=Numbers(0), help="Of gradients' norm, 0: none.  [default: 1]")
@click.option("--accumulate", type=click.IntRange(1), help="Batches of a step.  [default: 1]")
@click.option(
    "--precision",
    type=click.Choice(["auto", "float32", "bfloat16"]),
    help="Of products in training.  [default: auto]",
)
@click.option("--weight-decay", type=Numbers(0), help="Of matrices.  [default: 0]")
@click.option("--l1", type=Numbers(0), help="Times the sum of |w|.")
@click.option("--l2", type=Numbers(0), help="Times half the sum of w^2.")
@click.option("--group-lasso", "group", type=Numbers(0), help="Times the norms of rows.")
@click.option(
    "--patience",
    type=click.IntRange(1),
    help="Looks at held-out data, of 20, without a gain that end it.",
)
@click.option(
    "--front",
    is_flag=True,
    default=None,
    help="From a quarter of the way on, train what stands before the first edit too.",
)
@click.option(
    "--shard", is_flag=True, default=None, help="Divide the network between torchrun's processes."
)
@data_options(required=True, samples=512)
@output_options()
@to_option
@json_option
def recover(
    model: str, within: float | None, seconds: float | None, steps: int | None, output: Path,
    **options: Any,
) -> None:  # fmt: skip
    """Train an edited artifact toward its original.

    \b
    penjing recover ./cut --data calibration.jsonl --within 10m -o ./recovered
    penjing recover ./cut --data calibration.jsonl --steps 500 --hidden 1 -o ./recovered
    torchrun --nproc-per-node 2 -m penjing recover ./cut --data calibration.jsonl -o ./recovered
    """
    begin = time.monotonic()
    if within and seconds:
        raise UsageError("--within and --seconds", allowed="one of them: --within counts all that "
                         "the command does, --seconds the training")  # fmt: skip
    names = (
        "lr", "loss", "hidden", "codes", "rank", "block_steps", "optimizer", "schedule", "warmup",
        "clip", "accumulate", "precision", "weight_decay", "l1", "l2", "group", "patience",
        "front", "shard",
    )  # fmt: skip
    given = {name: value for name in names if (value := options.pop(name)) is not None}
    given["seconds"] = within or seconds or (0.0 if steps else 60.0)
    given["steps"] = steps or 0

    def work(later: Any, **more: Any) -> Any:
        from penjing import api

        api.STEPS["recover"](**given)  # refuses what it does before the model is loaded
        loaded = later.model
        size = sum(p.numel() * p.element_size() for p in loaded.module.parameters())
        spare = _STARTS + size * _BYTE + _SHARE * (within or 0.0) + (time.monotonic() - begin)
        ends = begin + within - spare if within else None
        return api.recover(loaded, deadline=ends, **given, **more)

    with _several():
        technique(work, model, output, remarks=_unhelped, **options)


@contextlib.contextmanager
def _several() -> Iterator[None]:
    """Where `torchrun` starts several processes they work as one, and the first alone speaks.

    All meet the same errors of input and usage; what one meets alone, a defect or too little
    memory, it says itself.
    """
    from penjing.together import group, rank

    with group():
        if not rank():
            yield
            return
        try:
            with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), \
                    contextlib.redirect_stderr(nowhere):  # fmt: skip
                yield
        except PenjingError as error:
            sys.exit(error.exit_status)


def _unhelped(before: Any, after: Any) -> list[str]:
    from penjing.training import UNJUDGED

    if len(after.curves) > len(before.curves):
        return [f"what was learned is {UNJUDGED}"] * (UNJUDGED in after.curves[-1]["why"])
    return ["what was learned is no better on held-out data, so weights are as they were; "
            "try a lower --lr, more time or more --samples"]  # fmt: skip
