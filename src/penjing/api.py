"""The verbs in Python, the same as on the command line.

    import penjing
    model = penjing.load("./my-model")
    small = penjing.quantize(penjing.cut(model, 2, data="text.jsonl"), bits=8)
    penjing.save(small, "./small", to=["onnx"])
    result = penjing.fit(model, "eval.jsonl", "./fitted", max_drop=0.01)

`model` is a Model or anything `load` takes; `data` a Dataset or a path. No verb changes the
model that it is given.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from penjing.apply import apply as _apply
from penjing.data import Dataset
from penjing.errors import InputError, UsageError
from penjing.export import export as _export
from penjing.fit.allocate import allocated
from penjing.given import Place, batches_of, edited, model_of, need, network_of
from penjing.gradients import LABELS
from penjing.inspect import inspect
from penjing.judging import evaluate, fit, measure
from penjing.judging import result_of as result_of
from penjing.learning import check_learned, learning
from penjing.load import load, original
from penjing.model import Batch, Model
from penjing.processor import weight_bits
from penjing.recipe import Recipe
from penjing.report import of_training
from penjing.report import write as report
from penjing.sensitivity import in_floats
from penjing.sizing import for_latency
from penjing.steps._select import LEARNED
from penjing.steps.attention import Attention
from penjing.steps.cache import Cache, check_decoder
from penjing.steps.constrain import Constrain
from penjing.steps.cut import Cut
from penjing.steps.equalize import Equalize
from penjing.steps.fold import Fold, has_norms
from penjing.steps.merge import Merge
from penjing.steps.prune import Prune
from penjing.steps.quantize import Quantize
from penjing.steps.recover import Recover
from penjing.steps.rotate import Rotate
from penjing.steps.shrink import OF, Shrink
from penjing.transfer import transfer
from penjing.tune import Cost, Tuned
from penjing.tune import tune as _tune
from penjing.verify import verify
from penjing.writers.artifact import extend
from penjing.writers.artifact import save as _save

__all__ = [
    "STEPS", "apply", "cut", "evaluate", "export", "fit", "inspect", "load", "measure", "prune",
    "quantize", "recover", "report", "save", "shrink", "transfer", "tune", "verify",
]  # fmt: skip

# Samples that show which inputs 8 bits harm.
_FEW = 24
# Patches that can be trained.
_TRAINED = ("linear", "low-rank")

_STEPS = (Prune, Shrink, Cut, Constrain, Fold, Merge, Equalize, Rotate, Quantize, Attention, Cache,
          Recover)  # fmt: skip
STEPS: dict[str, Any] = {step.name: step for step in _STEPS}


def _quiet(_: str) -> None:
    """Nobody listens."""


def apply(
    model: Model | Place,
    recipe: Recipe | Place,
    data: Dataset | Place | None = None,
    *,
    journal: Path | None = None,
    seed: int | None = None,
    samples: int = 128,
    length: int = 128,
    deadline: float | None = None,
) -> Model:
    """A copy of the model with a recipe's edits.

    Args:
        recipe: a Recipe or the path of a `recipe.toml`.
        data: calibration data.
        journal: folder to go on from after a kill.
        seed: in place of the recipe's own.
        samples, length: of calibration, at the most.
        deadline: when training must have ended, of `time.monotonic`.

    Raises:
        InputError: unusable model, recipe or data.
    """
    recipe = _recipe_of(recipe)
    if seed is not None:
        recipe = replace(recipe, seed=seed)
    check_learned(recipe)
    loaded = model_of(model)
    slopes = any("gradient" in step.needs for step in recipe.steps)
    needed = any(getattr(step, "loss", None) == LABELS for step in recipe.steps)
    batches = batches_of(loaded, data, samples, length, slopes, needed)
    return _done(loaded, recipe, batches, journal, deadline)


def _recipe_of(recipe: Recipe | Place) -> Recipe:
    """The recipe, read where it is a path."""
    if isinstance(recipe, Recipe):
        return recipe
    path = Path(recipe)
    if not path.is_file():
        raise InputError("no such recipe", got=path, next="give a recipe.toml")
    return Recipe.from_toml(path.read_text(encoding="utf-8"), STEPS)


def _done(
    model: Model, recipe: Recipe, batches: list[Batch], journal: Path | None,
    deadline: float | None = None,
) -> Model:  # fmt: skip
    """A copy with a recipe's edits, which its own recipe names after those before."""
    distils = any(step.name in ("recover", "constrain") for step in recipe.steps)
    before = original(model) if distils and edited(model) else None
    done = _apply(model, recipe, batches, original=before, journal=journal, deadline=deadline).model
    earlier = model.recipe.steps if model.recipe else ()
    done.recipe = Recipe((*earlier, *recipe.steps), recipe.seed)
    return done


def prune(
    model: Model | Place,
    sparsity: float = 0.5,
    *,
    pattern: str | None = None,
    criterion: str | None = None,
    ranking: str | None = None,
    learn: str | None = None,
    data: Dataset | Place | None = None,
    targets: Sequence[str] | None = None,
    seed: int = 0,
    **options: Any,
) -> Model:
    """A copy with the least important connections set to zero; see `penjing.steps.prune`.

    Args:
        pattern: `2:4` keeps two of every four inputs, whatever `sparsity` is; with `1x4` blocks of
            one output and four inputs stay or go whole.
        criterion: without one `admm` with data, `magnitude` without.
        ranking: `layer`, the same fraction of every layer, or `global`, layers against each other;
            without one `global` for `admm` without a pattern.
        learn: learn what goes in training, by a name of `penjing.constraints` (see
            `penjing.steps.constrain`, whose options `steps`, `lr`, `weights_lr`, `optimizer` and
            `loss` may follow); the criterion is then where it starts.
    """
    if learn is not None:
        if pattern is not None:
            raise UsageError("a pattern that is learned", got=pattern, next="give a sparsity")
        if ranking is not None:
            raise UsageError("a ranking of what is learned", got=ranking, next="leave it out")
        need(data, "a constraint that is learned")
        recipe = learning(learn, "weights", sparsity, Prune(sparsity, LEARNED), seed, options,
                          criterion=criterion, targets=tuple(targets or ()))  # fmt: skip
        return apply(model, recipe, data, **options)
    chosen = criterion or ("admm" if data is not None else "magnitude")
    if ranking is None:
        ranking = "global" if chosen == "admm" and pattern is None else "layer"
    step = Prune(sparsity, chosen, pattern, targets=tuple(targets or ()), ranking=ranking)
    if step.needs and data is None:
        raise UsageError(f"criterion {chosen} needs data", next="give --data, or use magnitude")
    return apply(model, Recipe((step,), seed), data, **options)


def shrink(
    model: Model | Place,
    ratio: float = 0.5,
    *,
    data: Dataset | Place | None = None,
    of: str = "units",
    criterion: str = "gram",
    ranking: str = "layer",
    heads: float | None = None,
    multiple: int = 8,
    learn: str | None = None,
    targets: Sequence[str] | None = None,
    seed: int = 0,
    tell: Callable[[str], object] = _quiet,
    **options: Any,
) -> Model:
    """A copy without the least important neurons; see `penjing.steps.shrink`.

    Args:
        ratio: what goes, of the units of every group; with `of` parameters, macs or latency, of
            those of the whole network. Latency is measured, see `penjing.sizing`.
        ranking: `layer`, the same fraction of every group; `global` or `measured`, groups against
            each other.
        multiple: units that stay are a multiple of it, which kernels want; of heads any number.
        learn: learn what goes in training, all groups together, see `prune`.
        tell: gets a line about what was measured.
    """
    need(data, "shrink")
    if of not in (*OF, "latency"):
        raise UsageError("of", got=repr(of), allowed=", ".join((*OF, "latency")))
    chosen = tuple(targets or ())
    timed = of == "latency"
    if learn is not None:
        for name, value, usual in (("heads", heads, None), ("ranking", ranking, "layer")):
            if value != usual:
                raise UsageError(f"{name}, of a constraint that is learned", got=value,
                                 next="leave it out: how many of each go is learned")  # fmt: skip
        if timed:
            raise UsageError("latency, of a constraint that is learned", allowed=", ".join(OF))
        recipe = learning(learn, "neurons", ratio, Shrink(criterion=LEARNED), seed, options,
                          measure=of, criterion=criterion, targets=chosen,
                          multiple=multiple)  # fmt: skip
        return apply(network_of(model, "shrink"), recipe, data, **options)
    step = Shrink(ratio, heads, criterion, targets=chosen, multiple=multiple,
                  of="macs" if timed else of, ranking=ranking)  # fmt: skip
    loaded = network_of(model, "shrink")
    if timed:
        return _timed(loaded, step, ratio, data, seed, tell, **options)
    return apply(loaded, Recipe((step,), seed), data, **options)


def _timed(
    model: Model,
    step: Shrink,
    ratio: float,
    data: Dataset | Place | None,
    seed: int,
    tell: Callable[[str], object],
    *,
    journal: Path | None = None,
    samples: int = 128,
    length: int = 128,
) -> Model:
    """A copy shrunk until a share of the latency is gone."""
    batches = batches_of(model, data, samples, length, "gradient" in step.needs)
    ranked_by = [] if step.ranking == "layer" else batches
    step, sized = for_latency(model, step, ratio, ranked_by, length=length, folder=journal)
    tell(sized.describe())
    return _done(model, Recipe((step,), seed), batches, journal)


def cut(
    model: Model | Place,
    layers: int | float | None = None,
    *,
    ratio: float | None = None,
    data: Dataset | Place | None = None,
    part: str = "block",
    of: str = "parameters",
    criterion: str = "influence",
    patch: str = "linear",
    refit: bool = False,
    train: int = 0,
    learn: str | None = None,
    seed: int = 0,
    **options: Any,
) -> Model:
    """A copy without the least important blocks; see `penjing.steps.cut`.

    Args:
        layers: how many blocks go, or with the part `any` as much as so many have; a fraction
            below 1 is a ratio.
        part, of, criterion, patch, refit: as in the step.
        train: steps of distillation of the patches alone, when they are in their places.
        learn: learn what goes in training, see `prune`. Where the weights are trained along there
            is no patch: they have made up for what is gone.
    """
    if isinstance(layers, float) and 0 < layers < 1:
        layers, ratio = None, layers
    if layers is not None and layers != int(layers):
        raise UsageError("layers", got=layers, allowed="a whole number, or a ratio below 1")
    need(data, "cut")
    count = None if layers is None else int(layers)
    step = Cut(count, ratio, part=part, of=of, criterion=criterion, patch=patch, refit=refit,
               seed=seed)  # fmt: skip
    if learn is not None:
        if part != "block":
            raise UsageError("part with learn", got=part, allowed="block")
        if train:
            raise UsageError("train with learn", next="leave it out, or use penjing recover after")
        loaded = network_of(model, "cut")
        budget = ratio or int(count or 0) / max(1, len(loaded.blocks))
        trained = bool(options.get("weights_lr"))
        step = Cut(
            criterion=LEARNED, patch="none" if trained else patch, refit=refit and not trained
        )
        recipe = learning(learn, "layers", budget, step, seed, options, criterion=criterion)
        return apply(loaded, recipe, data, **options)
    if not train:
        return apply(network_of(model, "cut"), Recipe((step,), seed), data, **options)
    if patch not in _TRAINED or part not in ("block", "any"):
        raise UsageError("train, of patches", got=f"patch {patch} of part {part}",
                         allowed=f"patch {' or '.join(_TRAINED)}, of blocks")  # fmt: skip
    patches = Recover(seconds=0, steps=train, lr=1e-3, seed=seed, targets=("*penjing_*",))
    recipe = Recipe((step, patches), seed)
    return apply(network_of(model, "cut"), recipe, data, **{"samples": 512, **options})


def quantize(
    model: Model | Place,
    bits: float = 8,
    *,
    group: int = 0,
    method: str | None = None,
    codes: str = "integer",
    scale_bits: int = 32,
    activations: int | None = None,
    embeddings: int | None = None,
    symmetric: bool | None = None,
    rotate: bool = False,
    refine: int = 0,
    observer: str = "minmax",
    attention: int | None = None,
    kv_cache: int | None = None,
    floats: float = 0.0,
    mixed: bool | Sequence[int] = False,
    data: Dataset | Place | None = None,
    targets: Sequence[str] | None = None,
    seed: int = 0,
    **options: Any,
) -> Model:
    """A copy with integer weights, and with `activations=8` integer inputs; see the step.

    Without a method: `gptq` with data, `rtn` without. With activations and no data, ranges are
    found at run time. Batch norms are folded into their convolutions first. Where this processor's
    sums of byte products saturate, weights beside integer inputs are paired, or have 7 of their 8
    bits (methods other than gptq and rtn). `kv_cache` is 8 or 4 bits of a decoder's keys and
    values; their ranges need data. `floats` is the share of the work that may stay in floats, see
    `penjing.sensitivity`. `refine` is steps of gradient descent on a block after it is quantized.
    `observer` chooses the ranges of inputs, a name of `penjing.observers` or `auto`.
    `mixed`: bits and group of each layer by need, in no more bytes than `bits` and `group` would
    take (`penjing.fit.allocate`); or the bits that layers may have.
    `attention=8` rounds queries and keys too, from data (the step `Attention`; OpenVINO).
    """
    if kv_cache is not None:
        need(data, "a KV cache in integers")
    narrow = bool(activations) and bits == 8 and weight_bits() < 8
    paired = narrow and method in (None, "gptq", "rtn")
    if narrow and not paired:
        bits = weight_bits()
    if method == "awq":
        need(data, "quantize with the method awq")
    if refine:
        need(data, "quantize with refine")
    if floats:
        need(data, "what to leave in floats")
    if mixed:
        need(data, "bits by layer")
    step = Quantize(
        bits,
        group,
        method or ("gptq" if data is not None else "rtn"),
        bool(activations) if symmetric is None else symmetric,
        activations=activations or 0,
        dynamic=bool(activations) and data is None,
        embeddings=embeddings or 0,
        embedding_group=32 if (embeddings or 8) < 8 else 0,
        targets=tuple(targets or ()),
        codes=codes,
        scale_bits=scale_bits,
        rotate=rotate,
        observer=observer,
        refine=refine,
        paired=paired,
    )
    loaded = model_of(model)
    if kv_cache is not None:
        check_decoder(loaded)
    plain = loaded  # what is quantized
    if (floats or mixed) and has_norms(loaded):
        plain = _apply(loaded, Recipe((Fold(),))).model
    if floats:
        few = batches_of(loaded, data, _FEW, options.get("length", 128))
        step = replace(step, skip=in_floats(plain, few, floats))
    if mixed:
        given = {"samples": 128, "length": 128} | options
        batches = batches_of(loaded, data, given["samples"], given["length"])
        step = allocated(plain, step, batches, None if mixed is True else mixed)
    steps: tuple[Any, ...] = (Fold(), step) if has_norms(loaded) else (step,)
    if attention is not None:
        steps += (Attention(),)
    if kv_cache is not None:
        steps += (Cache(kv_cache),)
    return apply(loaded, Recipe(steps, seed), data, **options)


def recover(
    model: Model | Place,
    data: Dataset | Place | None = None,
    *,
    seconds: float = 60.0,
    lr: float = 1e-4,
    loss: str | None = None,
    seed: int = 0,
    **options: Any,
) -> Model:
    """A copy trained toward the original's outputs.

    Args:
        seconds, lr, loss, seed: as all other fields of `penjing.steps.recover.Recover`, which may
            follow, e.g. `steps`, `hidden`, `rank`, `optimizer` or `patience`.
        options: of `apply`: `samples`, `length`, `journal`, `deadline`.
    """
    need(data, "recover")
    own = {f.name: options.pop(f.name) for f in fields(Recover) if f.name in options}
    step = Recover(seconds=seconds, lr=lr, loss=loss, seed=seed, **own)
    loaded = model_of(model)
    if not edited(loaded):
        raise UsageError("nothing to recover: the model is not edited", next="edit it first")
    return apply(loaded, Recipe((step,), seed), data, **{"samples": 512, **options})


def tune(
    model: Model | Place,
    recipe: Recipe | Place,
    search: Sequence[str],
    output: Place,
    *,
    data: Dataset | Place | None = None,
    objective: str | Sequence[str] | Cost = "quality",
    trials: int = 40,
    **options: Any,
) -> Tuned:
    """Search the options of a recipe's steps; write the best artifact, measured.

    Args:
        search: lines `STEP.OPTION=LOW..HIGH[:log|:int|:STEP]` or `STEP.OPTION=a|b|c`.
        data: what quality is measured on, half of it by trials and the other half of the artifact
            alone; calibration data is split off it without `calibration`.
        objective: `quality`, `size`, `latency`, or several of them; or a function of a Recipe,
            less is better, by which nothing is measured.
        trials: at the most.
        options: `calibration`, `samples` of it at the most (128), `task`, `max_drop`, `max_size`
            (bytes), `max_latency` (seconds), `within` (seconds), `runtime`, `batch`, `length`,
            `threads`, `seed`, `confidence`, `storage` (a database's URL), `journal` (a folder),
            `overwrite`, `concurrency` (trials that may be made at once, 4), `workers` (processes),
            `ray` (a cluster's address), `insecure` (it may ask for no token).

    Raises:
        UsageError: a line that does not fit the recipe, or no Optuna.
        InputError: unusable model or data, an existing output, another process at this search.
        BudgetError: no trial came to any figures.
    """
    steps = _recipe_of(recipe)
    check_learned(steps)
    return _tune(model, steps, search, Path(output), make=apply, data=data, objective=objective,
                 trials=trials, **options)  # fmt: skip


def save(
    model: Model,
    output: Place,
    *,
    to: Sequence[str] = (),
    recipe: Recipe | None = None,
    overwrite: bool = False,
) -> None:
    """Write an artifact, with exports (as `penjing export --to`) that passed parity.

    What was trained has its curves in `report.html`.
    """

    def extra(folder: Path) -> None:
        if to:
            _export(model, folder, tuple(to))
        if model.curves:
            page = of_training(model, made_by, Path(output).name)
            (folder / "report.html").write_text(page, encoding="utf-8")

    made_by = recipe or model.recipe
    _save(model, Path(output), recipe=made_by, extra=extra, overwrite=overwrite)


def export(artifact: Place, to: Sequence[str] = ("onnx",)) -> dict[str, float]:
    """Add exports to an artifact; deviation from the torch model by target.

    Raises:
        ExportError: an exported file does not agree; the artifact is as it was.
    """
    model, found = load(os.fspath(artifact)), {}
    extend(Path(artifact), lambda folder: found.update(_export(model, folder, tuple(to))))
    return found
