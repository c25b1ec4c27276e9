"""One technique at a time: prune, shrink, cut, quantize, apply."""

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
    to_option,
)
from penjing.cli.work import is_bare, pruned, removed, show_file, tables_in_floats, technique
from penjing.errors import InputError, UsageError
from penjing.registry import choices
from penjing.scheme import FAMILIES, Scheme

__all__ = ["cut", "prune", "quantize", "replay", "shrink"]

# Exports that hold rotated weights.
_ROTATING = ("onnx", "openvino")
# Codes of several weights at once, which no export holds.
_TOGETHER = ("additive", "e8", "trellis")

# Criteria of neurons.
_NEURONS = ("gram", *sorted({*choices("unitcriteria"), *choices("criteria")}))

targets_option = click.option(
    "--targets", multiple=True, metavar="GLOB", help="Only layers with such a path; may repeat."
)


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
    training = learning(options)
    if training and pattern is not None:
        raise UsageError("--pattern with --learn", got=pattern, allowed="--sparsity")
    if ranking and training:
        raise UsageError("--ranking with --learn", got=ranking, next="leave it out")
    if is_bare(model, output):
        if ranking == "global":
            raise UsageError("--ranking global is for networks", got=f"{model}, bare weights")
        if training:
            raise UsageError("--learn is for networks", got=f"{model}, bare weights")
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
@click.option("--criterion", default="influence", show_default=True, metavar="NAME")
@click.option("--patch", default="linear", show_default=True, help="linear or none.")
@learn_options
@data_options(required=True)
@output_options()
@to_option
@json_option
def cut(
    model: str,
    layers: int | None,
    ratio: float | None,
    criterion: str,
    patch: str,
    output: Path,
    **options: Any,
) -> None:
    """Remove whole blocks.

    \b
    penjing cut ./my-model --layers 2 --data calibration.jsonl -o ./cut
    penjing cut ./my-model --layers 2 --learn gates --data calibration.jsonl -o ./cut
    """
    training = learning(options)
    if (layers is None) == (ratio is None):
        raise UsageError("how much to cut", allowed="either --layers 2 or --ratio 0.25")
    if ratio is not None and not 0 < ratio < 1:
        raise UsageError("--ratio", got=ratio, allowed="0 < ratio < 1")
    for name, value, allowed in (
        ("--criterion", criterion, ("influence", "random")),
        ("--patch", patch, ("linear", "none")),
    ):
        if value not in allowed:
            raise UsageError(f"unknown {name}", got=value, allowed=", ".join(allowed))
    technique(
        lambda m, **more: _api().cut(m, layers, ratio=ratio, **more),
        model,
        output,
        criterion=criterion,
        patch=patch,
        **training,
        **options,
    )


@click.command()
@model_options
@click.option("--bits", type=click.FloatRange(1, 8), default=8, show_default=True)
@click.option(
    "--group",
    type=click.IntRange(0),
    default=0,
    show_default=True,
    help="Inputs that share a scale; 0 is the whole row.",
)
@click.option("--codes", default="integer", show_default=True, help=f"{', '.join(FAMILIES)}.")
@click.option(
    "--scale-bits",
    type=click.Choice(["32", "16", "8"]),
    default="32",
    show_default=True,
    help="Bits of a stored scale.",
)
@click.option("--activations", type=click.IntRange(8, 8), help="8 for 8-bit layer inputs.")
@click.option(
    "--kv-cache", type=click.Choice(["8", "4"]), help="Bits of a decoder's keys and values."
)
@click.option("--embeddings", type=click.IntRange(2, 8), help="Bits of embedding tables.")
@click.option("--method", type=Leaf("quantizers"), help="Default: gptq with data, rtn without.")
@click.option("--symmetric/--asymmetric", default=None, help="Default: what the runtime wants.")
@click.option(
    "--floats",
    type=RATIO,
    default="0",
    metavar="15%",
    help="Share of the work that may stay in floats, from the input on.",
)
@click.option("--rotate", is_flag=True, help="Quantize weights in a rotated basis of their inputs.")
@click.option(
    "--refine",
    type=click.IntRange(0),
    default=0,
    metavar="64",
    help="Steps of gradient descent on each block's scales and codes.",
)
@click.option("--dequantize", is_flag=True, help="Weight files only: store the floats.")
@targets_option
@data_options()
@output_options()
@to_option
@json_option
def quantize(
    model: str,
    bits: float,
    group: int,
    codes: str,
    scale_bits: str,
    activations: int | None,
    kv_cache: str | None,
    floats: float,
    embeddings: int | None,
    method: str | None,
    symmetric: bool | None,
    rotate: bool,
    refine: int,
    dequantize: bool,
    output: Path,
    overwrite: bool,
    as_json: bool,
    targets: tuple[str, ...],
    **options: Any,
) -> None:
    """Store weights, and activations where asked, in fewer bits.

    \b
    penjing quantize ./my-model --bits 4 --group 64 --data calibration.jsonl -o ./small
    penjing quantize params.npy --bits 8 -o out.npz
    """
    if bits == int(bits):
        bits = int(bits)
    Scheme(bits, group, bool(symmetric), codes, int(scale_bits))
    if is_bare(model, output):
        check_model(model)
        if codes != "integer" or scale_bits != "32" or rotate:
            raise UsageError(
                "codes of a bare weight file",
                got=f"{codes}, scales of {scale_bits} bits" + ", rotated" * rotate,
                allowed="integer, scales of 32 bits, not rotated",
            )
        if kv_cache or floats or refine:
            raise UsageError(
                "--kv-cache, --floats and --refine are for networks", got=f"{model}, bare weights",
                next="leave them out",
            )  # fmt: skip
        if method == "awq":
            raise UsageError("method awq of a bare weight file", next="use the method clip")
        from penjing.weights import quantize_file

        found = quantize_file(
            Path(model),
            output,
            int(bits),
            group=group,
            method=method or "rtn",
            dequantize=dequantize,
            symmetric=bool(symmetric),
            targets=targets,
            overwrite=overwrite,
        )
        show_file(found, output, as_json)
        return
    if dequantize:
        raise UsageError("--dequantize is for bare weight files", next="leave it out")
    if rotate and (held := sorted(set(options["to"]) - set(_ROTATING))):
        raise UsageError("--rotate with --to", got=", ".join(held), allowed=", ".join(_ROTATING))
    if kv_cache and (held := sorted(set(options["to"]) - {"onnx"})):
        raise UsageError("--kv-cache with --to", got=", ".join(held), allowed="onnx")
    if codes in _TOGETHER and options["to"]:
        raise UsageError(
            f"--codes {codes} with --to", got=", ".join(options["to"]), allowed="no export",
            next="leave --to out: Python and the runtime packed run it",
        )  # fmt: skip
    technique(
        lambda m, **more: _api().quantize(m, bits, **more),
        model,
        output,
        overwrite=overwrite,
        as_json=as_json,
        group=group,
        codes=codes,
        scale_bits=int(scale_bits),
        method=method,
        activations=activations,
        embeddings=embeddings,
        kv_cache=int(kv_cache) if kv_cache else None,
        floats=floats,
        symmetric=symmetric,
        rotate=rotate,
        refine=refine,
        targets=targets or None,
        remarks=lambda before, after: tables_in_floats(before, after, embeddings is not None),
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
