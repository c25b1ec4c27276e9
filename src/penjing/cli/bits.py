"""Fewer bits: quantize."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click

from penjing.cli.options import (
    RATIO,
    Leaf,
    check_model,
    data_options,
    json_option,
    model_options,
    output_options,
    targets_option,
    to_option,
)
from penjing.cli.work import (
    bits_by_layer,
    check_bare,
    is_bare,
    show_file,
    tables_in_floats,
    technique,
)
from penjing.errors import UsageError
from penjing.scheme import FAMILIES, Scheme

__all__ = ["quantize"]

# Exports that hold rotated weights.
_ROTATING = ("onnx", "openvino")
# Bits that those store as they are.
_STORED = (2, 4, 8)
# Groups of linear layers that an export holds, as well as the whole row.
_GROUPS: dict[str, tuple[Callable[[int, int], bool], str]] = {
    "onnx": (lambda group, _: group % 16 == 0, "multiples of 16"),
    "gguf": (lambda group, _: group % 32 == 0, "multiples of 32"),
    "compressed-tensors": (lambda group, inputs: inputs % group == 0, "what divides the inputs"),
}
# Codes of several weights at once, which no export holds.
_TOGETHER = ("additive", "e8", "trellis")


def _check_xnnpack(bits: float, group: int, symmetric: bool) -> None:
    """What `--to executorch` has no kernel for, before the work.

    Raises:
        UsageError: neither 8 or 7 bits with a scale a row nor 4 bits in groups.
    """
    rows, blocks = bits in (7, 8) and not group, bits == 4 and not group % 32
    if not (symmetric and (rows or blocks)):
        raise UsageError(
            "--to executorch",
            got=f"--bits {bits:g} --group {group}{'' if symmetric else ' --asymmetric'}",
            allowed="symmetric: 8 or 7 bits, a scale a row; 4, in groups of a multiple of 32",
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
@click.option(
    "--mixed", is_flag=True,
    help="Bits and group of each layer by need, in the bytes of --bits and --group.",
)  # fmt: skip
@click.option("--rotate", is_flag=True, help="Quantize weights in a rotated basis of their inputs.")
@click.option(
    "--refine",
    type=click.IntRange(0),
    default=0,
    metavar="64",
    help="Steps of gradient descent on each block's scales and codes.",
)
@click.option(
    "--observer",
    type=Leaf("observers", "auto"),
    help="How ranges of 8-bit inputs are chosen; default minmax.",
)
@click.option(
    "--attention",
    type=click.IntRange(8, 8),
    help="8 for an encoder's queries and keys, beside 8-bit inputs; for OpenVINO.",
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
    mixed: bool,
    embeddings: int | None,
    method: str | None,
    symmetric: bool | None,
    rotate: bool,
    refine: int,
    observer: str | None,
    attention: int | None,
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
        networks = {"activations": activations, "embeddings": embeddings, "kv_cache": kv_cache,
                    "floats": floats, "refine": refine, "observer": observer,
                    "attention": attention, "mixed": mixed}  # fmt: skip
        check_bare(model, options | networks)
        check_model(model)
        if codes != "integer" or scale_bits != "32" or rotate:
            raise UsageError(
                "codes of a bare weight file",
                got=f"{codes}, scales of {scale_bits} bits" + ", rotated" * rotate,
                allowed="integer, scales of 32 bits, not rotated",
            )
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
    if observer and not (activations and options["data"]):
        raise UsageError("--observer", got=observer, allowed="with --activations 8 and --data")
    if mixed and (codes != "integer" or activations or not options["data"] or bits != int(bits)):
        raise UsageError(
            "--mixed",
            got=f"--codes {codes}, --bits {bits:g}" + ", --activations" * bool(activations)
            if options["data"] else "no --data",
            allowed="with --data, whole --bits of integers, and inputs in floats",
        )  # fmt: skip
    if mixed and (held := sorted(set(options["to"]) - set(_ROTATING))):
        raise UsageError("--mixed with --to", got=", ".join(held), allowed=", ".join(_ROTATING))
    if attention and not (activations and options["data"]):
        raise UsageError("--attention", got=attention, allowed="with --activations 8 and --data")
    if attention and (held := sorted(set(options["to"]) - {"openvino"})):
        raise UsageError("--attention with --to", got=", ".join(held), allowed="openvino")
    if codes in _TOGETHER and options["to"]:
        raise UsageError(
            f"--codes {codes} with --to", got=", ".join(options["to"]), allowed="no export",
            next="leave --to out: Python and the runtime packed run it",
        )  # fmt: skip

    if "executorch" in options["to"]:
        symmetric = True if symmetric is None else symmetric
        _check_xnnpack(bits, group, symmetric)
    refusing = (
        "gguf",
        "compressed-tensors",
        "executorch",
        *(("openvino",) if codes == "power2" else ()),
    )
    if codes != "integer" and (held := sorted(set(options["to"]) & set(refusing))):
        raise UsageError(
            f"--codes {codes} with --to", got=", ".join(held),
            allowed="onnx" if codes == "power2" else "onnx, openvino",
        )  # fmt: skip

    def work(loaded: Any, **more: Any) -> Any:
        from penjing import api

        if kv_cache and options["to"]:
            _check_heads(loaded.model)
        if group and set(options["to"]) & set(_GROUPS):
            _check_groups(loaded.model, group, targets, options["to"])
        return api.quantize(loaded, bits, **more)

    technique(
        work,
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
        mixed=(_STORED if options["to"] else True) if mixed else False,
        symmetric=symmetric,
        rotate=rotate,
        refine=refine,
        observer=observer or "minmax",
        attention=attention,
        targets=targets or None,
        remarks=lambda before, after: [
            *tables_in_floats(before, after, embeddings is not None),
            *(bits_by_layer(after) if mixed else ()),
        ],
        **options,
    )


def _check_groups(model: Any, group: int, targets: tuple[str, ...], to: Sequence[str]) -> None:
    """Before the work: groups that an export cannot hold, where a row has more than one."""
    from torch import nn

    from penjing.steps._select import matches

    for path, layer in model.module.named_modules():
        if not isinstance(layer, nn.Linear) or not matches(path, targets):
            continue
        for name in to:
            holds, allowed = _GROUPS.get(name, (None, ""))
            if holds and group < layer.in_features and not holds(group, layer.in_features):
                raise UsageError(
                    f"--group with --to {name}", got=f"{group} of {layer.in_features} inputs at "
                    f"{path}", allowed=f"{allowed}; 0 is the whole row",
                )  # fmt: skip


def _check_heads(model: Any) -> None:
    """Before the work: onnxruntime keeps integers of heads that are a multiple of 8 wide."""
    from penjing.cache import attention_layers

    for path in attention_layers(model.module).values():
        width = getattr(model.module.get_submodule(path), "head_dim", None)
        if isinstance(width, int) and width % 8:
            raise UsageError(
                "--kv-cache with --to onnx", got=f"heads of {width} at {path}",
                allowed="heads that are a multiple of 8 wide",
                next="leave --to out: Python and the runtime packed run it",
            )  # fmt: skip
