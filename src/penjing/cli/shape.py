"""One technique at a time: prune, shrink, cut, apply."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from penjing.cli.options import (
    RATIO,
    Leaf,
    check_model,
    data_options,
    json_option,
    learn_options,
    learning,
    model_options,
    output_options,
    targets_option,
    to_option,
)
from penjing.cli.work import (
    check_bare,
    cut_short,
    is_bare,
    note,
    pruned,
    removed,
    show_file,
    technique,
)
from penjing.errors import InputError, UsageError
from penjing.registry import choices

__all__ = ["cut", "prune", "replay", "shrink"]

# Criteria of neurons.
_NEURONS = ("gram", *sorted({*choices("unitcriteria"), *choices("criteria")}))


@click.command()
@model_options
@click.option("--sparsity", type=RATIO, metavar="0.5", help="Fraction of the weights that go.")
@click.option(
    "--pattern",
    metavar="N:M|RxC",
    help="Keep N of every M inputs, e.g. 2:4; or remove blocks of R outputs by C inputs, e.g. 1x4.",
)
@click.option(
    "--criterion",
    type=Leaf("criteria", *choices("pruners")),
    help="Default: admm with data, magnitude without.",
)
@click.option(
    "--ranking",
    type=click.Choice(["layer", "global"]),
    help="The same fraction of each layer, or layers against each other (default with admm).",
)
@click.option("--compress", is_flag=True, help="Deflate a bare .npz, which numpy undoes itself.")
@learn_options
@targets_option
@data_options()
@output_options()
@to_option
@json_option
def prune(
    model: str,
    sparsity: float | None,
    pattern: str | None,
    criterion: str | None,
    ranking: str | None,
    compress: bool,
    output: Path,
    overwrite: bool,
    as_json: bool,
    targets: tuple[str, ...],
    **options: Any,
) -> None:
    """Remove single connections.

    \b
    penjing prune ./my-model --sparsity 0.5 --data calibration.jsonl -o ./pruned
    penjing prune ./my-model --sparsity 0.5 --pattern 1x4 --data calibration.jsonl -o ./pruned
    penjing prune ./my-model --sparsity 0.5 --learn gates --data calibration.jsonl -o ./pruned
    penjing prune params.npy --sparsity 50% --compress -o out.npz
    """
    if sparsity is None and pattern is None:
        raise UsageError("how much to prune", allowed="--sparsity 0.5 or --pattern 2:4")
    says = ":" in (pattern or "")
    if sparsity is not None and says:
        raise UsageError(
            "--sparsity and --pattern", got=f"{sparsity:g} and {pattern}",
            allowed="one of them: a pattern N:M says how much goes",
        )  # fmt: skip
    if sparsity is None and not says:
        raise UsageError(
            f"--pattern {pattern} without --sparsity",
            allowed="N:M such as 2:4, or blocks such as 1x4 with --sparsity 0.5",
        )
    if sparsity is not None and not 0 <= sparsity < 1:
        raise UsageError("--sparsity", got=sparsity, allowed="0 <= sparsity < 1")
    if sparsity == 0:
        note("--sparsity 0 removes nothing: what is written computes what it did")
    training = learning(options)
    if training and pattern is not None:
        raise UsageError("--pattern with --learn", got=pattern, allowed="--sparsity")
    if ranking and training:
        raise UsageError("--ranking with --learn", got=ranking, next="leave it out")
    if is_bare(model, output):
        check_bare(model, options | training)
        if ranking == "global":
            raise UsageError("--ranking global is for networks", got=f"{model}, bare weights")
        check_model(model)
        from penjing.weights import prune_file

        found = prune_file(
            Path(model),
            output,
            sparsity,
            criterion=criterion or "magnitude",
            pattern=pattern,
            targets=targets,
            overwrite=overwrite,
            compress=compress,
        )
        show_file(found, output, as_json)
        return
    if compress:
        raise UsageError("--compress is for bare .npz files", next="leave it out: what is pruned "
                         "of an artifact is stored without its zeros anyway")  # fmt: skip

    def asked() -> float:
        from penjing.masks import Pattern

        return Pattern.parse(pattern, sparsity).sparsity

    technique(
        lambda m, **more: _api().prune(m, 0.5 if sparsity is None else sparsity, **more),
        model,
        output,
        overwrite=overwrite,
        as_json=as_json,
        pattern=pattern,
        criterion=criterion,
        ranking=ranking,
        targets=targets or None,
        remarks=lambda before, after: pruned(asked(), before, after),
        **training,
        **options,
    )


@click.command()
@model_options
@click.option("--ratio", type=RATIO, required=True, metavar="0.5", help="Fraction that goes.")
@click.option(
    "--of",
    type=click.Choice(["units", "parameters", "macs", "latency"]),
    default="units",
    show_default=True,
    help="Of each group's units, or of the whole network; latency is measured.",
)
@click.option(
    "--criterion",
    type=Leaf("criteria", "gram", *choices("unitcriteria")),
    default="gram",
    show_default=True,
    help=", ".join(_NEURONS) + ", or file.py:function.",
)
@click.option(
    "--ranking",
    type=click.Choice(["layer", "global", "measured"]),
    default="layer",
    show_default=True,
    help="The same fraction of each group, or groups against each other (not of units).",
)
@click.option(
    "--multiple",
    type=click.IntRange(1),
    default=8,
    show_default=True,
    help="Units that stay are a multiple, which kernels want; of heads any number.",
)
@learn_options
@targets_option
@data_options(required=True)
@output_options()
@to_option
@json_option
def shrink(
    model: str,
    ratio: float,
    of: str,
    ranking: str,
    output: Path,
    targets: tuple[str, ...],
    **options: Any,
) -> None:
    """Remove whole neurons: channels, hidden units, heads.

    \b
    penjing shrink ./my-model --ratio 0.25 --data calibration.jsonl -o ./shrunk
    penjing shrink ./my-model --ratio 30% --of macs --data calibration.jsonl -o ./shrunk
    penjing shrink ./my-model --ratio 30% --learn gates --data calibration.jsonl -o ./shrunk
    penjing shrink ./my-model --ratio 30% --of latency --data calibration.jsonl -o ./shrunk
    """
    if not 0 < ratio < 1:
        raise UsageError("--ratio", got=ratio, allowed="0 < ratio < 1")
    if ranking != "layer" and of == "units":
        raise UsageError(
            f"--ranking {ranking} of units", allowed="--of parameters, macs or latency",
            next="say what share of the network goes",
        )  # fmt: skip
    training = learning(options)
    told: list[str] = []
    technique(
        lambda m, **more: _api().shrink(m, ratio, of=of, ranking=ranking, tell=told.append, **more),
        model,
        output,
        remarks=lambda before, after: [
            *told,
            # Ranked against others, a block may well stay whole.
            *(
                removed(ratio if of == "units" else 0, before, after, everywhere=not training)
                if ranking == "layer"
                else ()
            ),
        ],
        targets=targets or None,
        **training,
        **options,
    )


@click.command()
@model_options
@click.option("--layers", type=click.IntRange(1), help="How many blocks go; or")
@click.option("--ratio", type=RATIO, metavar="0.25", help="which fraction of them.")
@click.option(
    "--part",
    type=click.Choice(["block", "attention", "mlp", "any"]),
    default="block",
    show_default=True,
    help="What goes of a block; any: whichever harms least for what it saves, "
    "until as much is gone as so many blocks have.",
)
@click.option(
    "--of",
    type=click.Choice(["parameters", "macs"]),
    default="parameters",
    show_default=True,
    help="What --part any saves.",
)
@click.option(
    "--criterion",
    type=click.Choice(["influence", "angular", "greedy", "evolution", "random"]),
    default="influence",
    show_default=True,
    help="Which blocks go.",
)
@click.option(
    "--patch",
    type=click.Choice(["linear", "low-rank", "fused", "merged", "none"]),
    default="linear",
    show_default=True,
    help="What stands in for whole blocks; fused and merged cost nothing at run time.",
)
@click.option("--refit", is_flag=True, help="Refit what writes the hidden state behind a gap.")
@click.option(
    "--train",
    type=click.IntRange(0),
    default=0,
    metavar="STEPS",
    help="Then train the patches alone, toward the outputs of the whole network; 100 are enough.",
)
@learn_options
@data_options(required=True)
@output_options()
@to_option
@json_option
def cut(
    model: str,
    layers: int | None,
    ratio: float | None,
    output: Path,
    **options: Any,
) -> None:
    """Remove whole blocks, or their attentions or MLPs.

    \b
    penjing cut ./my-model --layers 2 --data calibration.jsonl -o ./cut
    penjing cut ./my-model --layers 2 --criterion greedy --refit --data calibration.jsonl -o ./cut
    penjing cut ./my-model --layers 2 --part attention --data calibration.jsonl -o ./cut
    penjing cut ./my-model --ratio 0.2 --part any --data calibration.jsonl -o ./cut
    penjing cut ./my-model --layers 2 --learn gates --data calibration.jsonl -o ./cut
    """
    training = learning(options)
    if (layers is None) == (ratio is None):
        raise UsageError("how much to cut", allowed="either --layers 2 or --ratio 0.25")
    if ratio is not None and not 0 < ratio < 1:
        raise UsageError("--ratio", got=ratio, allowed="0 < ratio < 1")
    technique(
        lambda m, **more: _api().cut(m, layers, ratio=ratio, **more),
        model,
        output,
        # Of parts of several sizes the share is of parameters or MACs.
        remarks=lambda before, after: (
            () if options["part"] == "any" else cut_short(ratio, before, after)
        ),
        **training,
        **options,
    )


@click.command(name="apply")
@model_options
@click.argument("recipe", type=click.Path(path_type=Path))
@data_options(seed=None)  # the recipe has its own
@output_options()
@to_option
@json_option
def replay(model: str, recipe: Path, output: Path, **options: Any) -> None:
    """Replay the steps of a recipe.toml.

    \b
    penjing apply ./my-model ./fitted/recipe.toml --data calibration.jsonl -o ./again
    """
    if not recipe.is_file():
        raise InputError("no such recipe", got=recipe, next="give a recipe.toml")
    technique(
        lambda m, **more: _api().apply(m, recipe, **more),
        model,
        output,
        **options,
    )


def _api() -> Any:
    from penjing import api

    return api
