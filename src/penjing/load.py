"""`load`: from a path to a Model, whatever kind of model the path is."""

from __future__ import annotations

from pathlib import Path

from penjing.errors import InputError, UsageError
from penjing.graph import find_blocks
from penjing.model import Model, Source
from penjing.readers import _transformers, artifact, factory, gguf, huggingface
from penjing.readers import weights as bare

__all__ = ["build", "load", "original"]

_ACCEPTED = (
    "a folder with config.json and safetensors, a .gguf file, file.py:function, "
    "package.module:function, a .npy .npz .safetensors .pth file, a penjing artifact"
)


def load(
    path: str | Path,
    *,
    weights: str | Path | None = None,
    allow_pickle: bool = False,
    planes: int | None = None,
) -> Model:
    """Read a model; float32, in eval mode, every tensor from its file.

    Args:
        path: a Hugging Face folder, a GGUF file of the llama family, `file.py:function` or
            `package.module:function`, a bare weight file, or a Penjing artifact.
        weights: the weight file of a factory, or `own` when the function loads them itself.
        allow_pickle: accept `pytorch_model.bin`; it is read weights-only even so.
        planes: of an artifact with nested codes, use only the first so many planes.

    Raises:
        InputError: nothing there, an unknown kind, or anything wrong with the model.
        UsageError: `weights` for something that has its own, `planes` for something without.
    """
    place = Path(path).expanduser()
    if planes is not None and not artifact.recognises(place):
        raise UsageError("planes are only in an artifact", got=path)
    if factory.recognises(place):
        return _with_blocks(factory.read(place, weights=weights))
    if weights is not None:
        raise UsageError("weights are only for a factory", got=path, allowed="file.py:function")
    try:
        there = place.exists()
    except (OSError, ValueError):
        there = False
    if not there:
        raise InputError("no such file or folder", got=path, next=f"check the path; {_ACCEPTED}")
    if artifact.recognises(place):
        return artifact.read(place, build=build, planes=planes)
    for reader in (huggingface, gguf, bare):
        if reader.recognises(place):
            return _with_blocks(reader.read(place, allow_pickle=allow_pickle))
    if place.suffix == ".onnx":
        raise InputError("ONNX files cannot be edited", got=path, next="give its source model")
    raise InputError("not a model", got=path, allowed=_ACCEPTED)


def build(source: Source) -> Model:
    """The empty model of a source, to be filled by an artifact's weights.

    Raises:
        InputError: an unknown kind, or code that is gone.
    """
    builders = {
        "huggingface": _transformers.build,
        "gguf": _transformers.build,
        "factory": factory.build,
        "weights": bare.build,
    }
    if source.kind not in builders:
        raise InputError("kind of source", got=source.kind, allowed=", ".join(builders))
    return builders[source.kind](source)


def original(model: Model) -> Model:
    """The unedited model that `model` was made from, read again.

    Raises:
        InputError: it is gone, or its weights are no longer the same.
    """
    details = model.source.details
    place = details.get("location", model.source.path)
    try:
        found = load(
            place, weights=details.get("weights"), allow_pickle=bool(details.get("allow_pickle"))
        )
    except InputError as error:
        raise InputError(
            "the original model cannot be read again", got=error, next="put it back where it was"
        ) from error
    if found.source.fingerprint != model.source.fingerprint:
        raise InputError(
            "the original model has changed since", got=place, next="put the old weights back"
        )
    return found


def _with_blocks(model: Model) -> Model:
    if model.interface != "weights":
        model.blocks = find_blocks(model.module)
    return model
