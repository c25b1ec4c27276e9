"""The verb `tune`: hyper-parameters of a recipe."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from penjing.cli.goal import finish
from penjing.cli.judged import judged_options
from penjing.cli.options import (
    check_model,
    json_option,
    model_options,
    not_yet,
    output_options,
    set_threads,
)
from penjing.cli.show import show_json, show_pairs
from penjing.cli.spread import worker_options
from penjing.cli.work import note
from penjing.errors import InputError
from penjing.files import check_output

if TYPE_CHECKING:
    from penjing.tune import Tuned

__all__ = ["tune"]


@click.command()
@model_options
@click.argument("recipe", type=click.Path(path_type=Path))
@click.option(
    "--search",
    multiple=True,
    required=True,
    metavar="STEP.OPTION=VALUES",
    help="LOW..HIGH[:log|:int|:STEP] or a|b|c, of a step of the recipe; may repeat.",
)
@judged_options(data=False, runtime="onnxruntime")
@click.option(
    "--objective",
    multiple=True,
    default=("quality",),
    show_default=True,
    metavar="NAME",
    help="quality, size, latency; several give a front; or file.py:function of a recipe.",
)
@click.option("--trials", type=click.IntRange(1), default=40, show_default=True)
@click.option(
    "--samples",
    type=click.IntRange(1),
    default=128,
    show_default=True,
    help="Calibration samples used, at the most.",
)
@click.option("--storage", metavar="URL", help="A database for the trials, e.g. sqlite:///t.db.")
@output_options()
@click.option(
    "--concurrency",
    type=click.IntRange(1),
    default=4,
    show_default=True,
    help="Trials that may be made at once; other trials for another number.",
)
@worker_options
@not_yet("--device")
@json_option
def tune(
    model: str,
    recipe: Path,
    weights: str | None,
    allow_pickle: bool,
    search: tuple[str, ...],
    objective: tuple[str, ...],
    max_size: float | None,
    threads: int | None,
    output: Path,
    overwrite: bool,
    as_json: bool,
    **options: Any,
) -> int:
    """Search the options of a recipe's steps.

    \b
    penjing tune ./my-model recipe.toml --search "quantize.group=32|64|128" --data eval.jsonl -o ./tuned
    penjing tune ./my-model recipe.toml --search "recover.lr=1e-5..1e-3:log" --data eval.jsonl --max-drop 1% -o ./tuned

    Exit status 3 when the budget could not be met; the nearest artifact is kept. A killed search
    goes on from its last finished trial when the same command is given again.
    """  # noqa: E501
    if not recipe.is_file():
        raise InputError("no such recipe", got=recipe, next="give a recipe.toml")
    check_model(model)
    given = (Path(str(options[name])) for name in ("data", "calibration") if options[name])
    check_output(output, overwrite, (Path(model), recipe, *given))
    set_threads(threads)
    from penjing import api

    try:
        found = api.tune(
            api.load(model, weights=weights, allow_pickle=allow_pickle),
            recipe,
            search,
            output,
            objective=objective,
            max_size=None if max_size is None else round(max_size),
            threads=threads,
            overwrite=overwrite,
            **options,
        )
    except (KeyboardInterrupt, SystemExit):
        note("finished trials are kept: the same command goes on from there")
        raise
    return _finish(found, output, as_json)


def _finish(found: Tuned, output: Path, as_json: bool) -> int:
    states = [r.outcome.state for r in found.trials if r.same is None]
    counts = {state: states.count(state) for state in ("complete", "pruned", "refused")}
    told: dict[str, Any] = {
        "params": found.params,
        "trials": counts,
        "front": [r.number for r in found.front],
        "importances": found.importances,
    }
    if as_json:
        table = {} if found.result is None else found.result.to_json()
        show_json(table | told | {"output": str(output)})
        return 0 if found.result is None or found.result.met else 3
    show_pairs({"trials": counts} | found.params, "chosen")
    for name, shares in found.importances.items():
        show_pairs({n: f"{share:.0%}" for n, share in shares.items()}, f"what mattered to {name}")
    if found.result is None:
        click.echo(f"wrote {output}")
        return 0
    return finish(found.result, output, as_json)
