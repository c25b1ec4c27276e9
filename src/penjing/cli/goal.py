"""Verbs with a goal: demo, fit."""

from __future__ import annotations

from pathlib import Path

import click

from penjing import profiles
from penjing.cli.judged import judged_options
from penjing.cli.options import (
    SIZE,
    check_model,
    json_option,
    model_options,
    output_options,
    set_threads,
)
from penjing.cli.show import show_json, show_result
from penjing.cli.spread import worker_options
from penjing.errors import InputError, printable
from penjing.files import check_output
from penjing.result import Result

__all__ = ["demo", "finish", "fit"]

OVER_BUDGET = 3


def finish(result: Result, output: Path, as_json: bool) -> int:
    if as_json:
        show_json(result.to_json() | {"output": str(output)})
    else:
        show_result(result, output)
    if result.met:
        return 0
    why = result.why or "the budget could not be met"
    click.echo(f"penjing: budget not met: {printable(why, 600)}", err=True)
    return OVER_BUDGET


@click.command()
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    default=Path("demo-out"),
    show_default=True,
    help="Folder to write.",
)
@click.option("--overwrite", is_flag=True, help="Replace an output that exists.")
@json_option
def demo(output: Path, overwrite: bool, as_json: bool) -> int:
    """The main job on a real sentence encoder that a package carries.

    \b
    penjing demo -o demo-out
    """
    check_output(output, overwrite)
    from penjing.demo import demo as run

    return finish(run(output, overwrite=overwrite), output, as_json)


@click.command()
@model_options
@judged_options(data=True, runtime="the faster one, measured")
@click.option("--max-memory", type=SIZE, metavar="500MB", help="Of the process, peak.")
@output_options(journal=False)
@worker_options
@click.option(
    "--device",
    metavar="FILE|ssh://HOST",
    help="Whose latency counts: a profile (penjing measure --profile), or a device itself.",
)
@json_option
def fit(
    model: str,
    weights: str | None,
    allow_pickle: bool,
    data: str,
    calibration: str | None,
    task: str | None,
    max_drop: float | None,
    max_size: float | None,
    max_latency: float | None,
    max_memory: float | None,
    runtime: str | None,
    within: float | None,
    batch: int,
    length: int,
    threads: int | None,
    seed: int,
    confidence: float,
    workers: int | None,
    ray: str | None,
    insecure: bool,
    output: Path,
    overwrite: bool,
    device: str | None,
    as_json: bool,
) -> int:
    """Make MODEL as small and fast as your budget asks, measured.

    \b
    penjing fit ./my-model --data eval.jsonl --max-drop 1% -o ./fitted
    penjing fit ./my-model --data eval.jsonl --max-size 25MB --max-latency 20ms -o ./fitted

    Without a limit it measures several and takes the knee of their front. Exit status 3 when the
    budget could not be met; the nearest artifact is kept.
    """
    check_model(model)
    check_output(output, overwrite, (Path(model), Path(data)))
    if device is None:
        set_threads(threads)
    elif not device.startswith("ssh:"):
        if not Path(device).is_file():
            raise InputError(
                "no such profile of a device", got=device,
                next="penjing measure --profile writes one",
            )  # fmt: skip
        profiles.read(Path(device), threads)
    from penjing import api

    result = api.fit(
        api.load(model, weights=weights, allow_pickle=allow_pickle),
        data,
        output,
        calibration=calibration,
        task=task,
        max_drop=max_drop,
        max_size=None if max_size is None else round(max_size),
        max_latency=max_latency,
        max_memory=None if max_memory is None else round(max_memory),
        runtime=runtime,
        within=within,
        batch=batch,
        length=length,
        threads=threads,
        seed=seed,
        overwrite=overwrite,
        confidence=confidence,
        workers=workers,
        ray=ray,
        insecure=insecure,
        device=device,
    )
    return finish(result, output, as_json)
