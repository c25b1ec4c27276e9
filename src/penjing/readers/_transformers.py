"""Build a transformers module from a configuration, without its code, its weights or a download.

Parameters are created on the meta device, where a matrix of any size costs nothing; buffers
that no checkpoint holds (rotary frequencies, position ids) are computed by the constructor.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers.models.auto import configuration_auto, modeling_auto
from transformers.pytorch_utils import Conv1D

from penjing.errors import InputError
from penjing.files import read_json
from penjing.graph import Transposed
from penjing.model import Batch, Model, Source
from penjing.readers._files import regular
from penjing.readers._images import image_size, preprocessor
from penjing.silence import hushed

__all__ = ["build", "check_config", "choose", "empty", "read_tokenizer", "straighten"]

_CODE = ("auto_map", "_target_", "custom_pipelines", "use_timm_backbone", "use_pretrained_backbone")
_LARGEST = 2**31
# Spaces, signs, digits, capitals and accents, which splitters of words treat in their own ways.
_TEXTS = ("Hello  world, it's 3.14!", "naïve_CamelCase  \n\tÉcole #42 日本語", "don't a-b/c")
_TOKENIZER_FILES = ("tokenizer.json", "vocab.txt", "vocab.json", "tokenizer.model", "spiece.model")
_FAMILIES = {
    "classifier": modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    "causal": modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    "image": modeling_auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
    "embedding": modeling_auto.MODEL_MAPPING_NAMES,
}


def check_config(config: Any, tensors: int, where: Path | str) -> dict[str, Any]:
    """The configuration without fields that choose code; refused where it asks for code.

    Args:
        config: parsed `config.json`.
        tensors: tensors in the checkpoint; every layer has at least one.
        where: named in errors.

    Raises:
        InputError: remote code, an already quantized model, an unknown type, absurd numbers.
    """
    if not isinstance(config, dict):
        raise InputError(f"{where} is not a JSON object", got=type(config).__name__)
    if config.get("quantization_config"):
        raise InputError(
            f"{where} describes an already quantized model",
            got="quantization_config",
            next="give the unquantized checkpoint",
        )
    clean: dict[str, Any] = _cleaned(config, tensors, where)
    kind = clean.get("model_type")
    if not isinstance(kind, str) or kind not in configuration_auto.CONFIG_MAPPING_NAMES:
        raise InputError(
            f"model_type in {where} is not one that transformers {transformers.__version__} has",
            got=repr(kind),
            next="install a newer transformers, or give the model as file.py:function",
        )
    return clean


def _cleaned(value: Any, tensors: int, where: Path | str, key: str = "") -> Any:
    if key in _CODE and value:
        raise InputError(
            f"{where} asks for code from outside transformers",
            got=key,
            next=f"remove {key} if transformers knows the model type, "
            "or give the model as file.py:function",
        )
    if isinstance(value, dict):
        # Which kernel runs attention is for us to say; a name there may be a hub repository.
        return {
            k: _cleaned(v, tensors, where, str(k))
            for k, v in value.items()
            if not k.endswith(("_implementation", "_implementation_internal"))
        }
    if isinstance(value, list):
        return [_cleaned(v, tensors, where, key) for v in value]
    if isinstance(value, int) and not isinstance(value, bool):
        layers = "layer" in key and key.startswith(("num_", "n_")) and "_per_" not in key
        if layers or key in ("depths", "depth", "num_blocks"):
            # A later layer than the file has tensors cannot be loaded, only be built for hours.
            if not 0 < value <= tensors and not (value == 0 and "hidden" not in key):
                raise InputError(
                    f"{key} in {where}", got=value, allowed=f"1 to {tensors}, the tensors there are"
                )
        elif key in ("num_labels", "_num_labels") and not 0 < value <= 1_000_000:
            raise InputError(f"{key} in {where}", got=value, allowed="1 to 1000000")
        elif key.startswith("max_") and not -1 <= value <= 2**26:
            raise InputError(f"{key} in {where}", got=value, allowed=f"up to {2**26}")
        elif key.endswith("_size") and "vocab" not in key and value < 0:
            raise InputError(f"{key} in {where}", got=value, allowed="positive")
        # transformers writes 1e30 for a tokenizer without a longest text.
        elif abs(value) > _LARGEST and key != "model_max_length":
            raise InputError(f"{key} in {where}", got=value, allowed=f"up to {_LARGEST}")
    return value


def choose(config: Mapping[str, Any], where: Path | str) -> tuple[str, str]:
    """Class name and interface for a checked configuration.

    Raises:
        InputError: an architecture that is none of the accepted four kinds.
    """
    kind = config["model_type"]
    named = config.get("architectures") or []
    if not isinstance(named, list) or not all(isinstance(n, str) for n in named):
        raise InputError(f"architectures in {where}", got=named, allowed="a list of one class name")
    offered: dict[str, str] = {}
    for interface, family in _FAMILIES.items():
        classes = family.get(kind, ())
        for name in (classes,) if isinstance(classes, str) else classes:
            offered.setdefault(name, interface)
    wanted = named[0] if named else next((n for n, i in offered.items() if i == "embedding"), None)
    if config.get("is_encoder_decoder") or wanted not in offered:
        raise InputError(
            f"architecture in {where}",
            got="an encoder-decoder" if config.get("is_encoder_decoder") else wanted,
            allowed=", ".join(offered) or "encoders, decoders, image classifiers",
            next="save the part that is to ship with one of these classes",
        )
    return str(wanted), offered[str(wanted)]


class _Meta(TorchFunctionMode):
    """`torch.empty` on the meta device: where layers allocate what is about to be loaded."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.empty:
            kwargs["device"] = "meta"
        return func(*args, **kwargs)


def empty(class_name: str, config: Mapping[str, Any], *, pooler: bool = False) -> nn.Module:
    """The module with its parameters and saved buffers on the meta device.

    Raises:
        InputError: the configuration's values do not make a module.
    """
    try:
        with hushed():  # it imports torchao where that is installed
            found: Any = getattr(transformers, class_name)
        settings = transformers.CONFIG_MAPPING[config["model_type"]].from_dict(dict(config))
        options: dict[str, Any] = {}
        if "add_pooling_layer" in inspect.signature(found.__init__).parameters:
            options["add_pooling_layer"] = pooler
        attention = "sdpa" if getattr(found, "_supports_sdpa", False) else "eager"
        with _Meta():
            module: nn.Module = found._from_config(
                settings, attn_implementation=attention, dtype=torch.float32, **options
            )
    except Exception as error:
        # Constructors fail on odd values in as many ways as there are constructors.
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"config.json does not describe a {class_name}", got=reason) from error
    straighten(module)
    made: dict[int, nn.Parameter] = {}
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                # One new parameter for one old, so that tied ones stay tied.
                twin = made.setdefault(id(parameter), nn.Parameter(parameter.to("meta")))
                part._parameters[name] = twin
        for name, buffer in part._buffers.items():
            if buffer is not None and name not in part._non_persistent_buffers_set:
                part._buffers[name] = buffer.to("meta")
            elif buffer is not None and buffer.is_meta:
                raise InputError(f"buffer {name} of {class_name} has no values", next="report this")
    return module.eval()


def straighten(module: nn.Module) -> bool:
    """Put linear layers in the place of GPT-2's `Conv1D`, whose matrix is [in, out]; where any are.

    The network computes the same, and every step knows what it is made of.
    """
    layers: dict[int, nn.Module] = {}
    weights: dict[int, nn.Parameter] = {}
    for path, layer in list(module.named_modules(remove_duplicate=False)):
        if isinstance(layer, Conv1D) and path:
            own = layers.setdefault(id(layer), Transposed(layer.nx, layer.nf))
            turned = nn.Parameter(layer.weight.detach().T.contiguous())  # [out, in]
            own.weight = weights.setdefault(id(layer.weight), turned)
            own.bias = layer.bias
            holder, _, last = path.rpartition(".")
            setattr(module.get_submodule(holder), last, own)
    return bool(layers)


def build(source: Source) -> Model:
    """The empty model of a Hugging Face or GGUF source: no weights, no tokenizer."""
    details = source.details
    module = empty(details["class"], details["config"])
    preprocess = None
    if details["interface"] == "image":
        settings = module.config
        table, fallback = details.get("preprocessor") or {}, getattr(settings, "image_size", None)
        channels = getattr(settings, "num_channels", 3)
        preprocess = preprocessor(table, fallback, channels)
        height, width = image_size(table, fallback)
        generator = torch.Generator().manual_seed(0)
        example: Batch = {
            "pixel_values": torch.randn(2, channels, height, width, generator=generator)
        }
    else:
        example = _token_example(module.config)
    return Model(module, details["interface"], example, source, preprocess=preprocess)


def _token_example(config: Any) -> Batch:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, config.vocab_size, (2, 8), generator=generator)  # [batch, length]
    # Some encoders count positions by what is not padding.
    pad = getattr(config, "pad_token_id", None)
    ids[ids == pad] = 0 if pad else min(1, config.vocab_size - 1)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def read_tokenizer(folder: Path) -> Any:
    """The tokenizer of a folder, or None when it has no tokenizer files.

    Raises:
        InputError: the files ask for code or cannot be read.
    """
    if not any((folder / name).exists() for name in _TOKENIZER_FILES):
        return None
    for path in folder.iterdir():
        if path.name in _TOKENIZER_FILES or path.suffix in (".json", ".txt"):
            regular(path, folder)
    settings = folder / "tokenizer_config.json"
    if settings.exists() and (table := read_json(settings)):
        _cleaned(table, 1, settings)
    options = {"local_files_only": True, "trust_remote_code": False}
    try:
        found = transformers.AutoTokenizer.from_pretrained(str(folder), **options)
        if (folder / "tokenizer.json").exists():
            # For some kinds of model the library puts its own splitting of words in the place of
            # the file's.
            own = transformers.PreTrainedTokenizerFast.from_pretrained(str(folder), **options)
            if any(own(t).input_ids != found(t).input_ids for t in _TEXTS):
                return own
        return found
    except Exception as error:
        # The tokenizer library raises bare Exceptions.
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"the tokenizer in {folder} cannot be read", got=reason) from error
