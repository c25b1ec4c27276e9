"""GGUF files of the llama family, dequantized to float32 in a `LlamaForCausalLM`.

llama.cpp rotates pairs (2i, 2i + 1) where transformers rotates (i, i + d/2); its converter
interleaves the rows of the query and key matrices to match, and this reader undoes that:

    W[head, half, i] = stored[head, i, half]
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from gguf.quants import dequantize
from torch import Tensor

from penjing.errors import InputError
from penjing.files import fingerprint
from penjing.ggufnames import parameter_of
from penjing.model import Model, Source
from penjing.readers._ggufheader import Header, TensorInfo, read_header
from penjing.readers._tensors import assign, to_float32
from penjing.readers._transformers import build, check_config

__all__ = ["read", "recognises"]


def recognises(path: Path) -> bool:
    """A file whose name ends in `.gguf`."""
    return path.suffix == ".gguf" and not path.is_dir()


def read(path: Path, *, allow_pickle: bool = False) -> Model:
    """Load a llama-family decoder and its tokenizer.

    Raises:
        InputError: a broken file, another architecture, missing or surplus tensors.
    """
    header = read_header(path)
    config = _config(header, path)
    details: dict[str, Any] = {
        "class": "LlamaForCausalLM", "interface": "causal", "config": config,
        "location": str(path.resolve()),
    }  # fmt: skip
    model = build(Source("gguf", str(path), fingerprint([path]), details))
    data = np.memmap(path, np.uint8, "r")
    tensors = {}
    for name, info in header.tensors.items():
        tensors[_name(name, path)] = _dequantized(data, info, name, config, path)
    tied = config["tie_word_embeddings"]
    assign(model.module, to_float32(tensors, path), path, {"lm_head.weight"} if tied else ())
    if tied:
        model.module.lm_head.weight = model.module.model.embed_tokens.weight  # type: ignore
    model.tokenizer = _tokenizer(path)
    return model


def _config(header: Header, path: Path) -> dict[str, Any]:
    keys = header.keys
    if keys.get("general.architecture") != "llama":
        raise InputError(
            f"architecture of {path}",
            got=keys.get("general.architecture"),
            allowed="llama",
            next="give the Hugging Face folder of the model",
        )
    if str(keys.get("llama.rope.scaling.type", "none")) != "none":
        raise InputError(
            f"{path} scales its rotary frequencies",
            got=keys["llama.rope.scaling.type"],
            next="give the Hugging Face folder of the model",
        )
    if keys.get("llama.expert_count"):
        raise InputError(f"{path} has experts", got=keys["llama.expert_count"], allowed="none")
    embedding = header.tensors.get("token_embd.weight")
    try:
        heads = keys["llama.attention.head_count"]
        config = {
            "model_type": "llama",
            "architectures": ["LlamaForCausalLM"],
            "vocab_size": embedding.shape[0] if embedding else keys["llama.vocab_size"],
            "hidden_size": keys["llama.embedding_length"],
            "intermediate_size": keys["llama.feed_forward_length"],
            "num_hidden_layers": keys["llama.block_count"],
            "num_attention_heads": heads,
            "num_key_value_heads": keys.get("llama.attention.head_count_kv", heads),
            "head_dim": keys.get(
                "llama.attention.key_length", keys["llama.embedding_length"] // heads
            ),
            "max_position_embeddings": keys["llama.context_length"],
            "rms_norm_eps": keys["llama.attention.layer_norm_rms_epsilon"],
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": keys.get("llama.rope.freq_base", 10000.0),
            },
            "attention_bias": "blk.0.attn_q.bias" in header.tensors,
            "tie_word_embeddings": "output.weight" not in header.tensors,
            "bos_token_id": keys.get("tokenizer.ggml.bos_token_id"),
            "eos_token_id": keys.get("tokenizer.ggml.eos_token_id"),
            "pad_token_id": keys.get("tokenizer.ggml.padding_token_id"),
        }
    except KeyError as error:
        raise InputError(f"{path} lacks a key", got=error.args[0]) from error
    except (TypeError, ZeroDivisionError) as error:
        raise InputError(f"{path} has a key of another type or 0", got=error) from error
    return check_config(config, len(header.tensors), path)


def _name(name: str, path: Path) -> str:
    if found := parameter_of(name):
        return found
    raise InputError(
        f"{path} has a tensor the model has no place for",
        got=name,
        next="give the Hugging Face folder of the model",
    )


def _dequantized(
    data: Any, info: TensorInfo, name: str, config: dict[str, Any], path: Path
) -> Tensor:
    raw = np.asarray(data[info.start : info.start + info.length])
    try:
        rows = raw.reshape(*info.shape[:-1], -1)
        values = np.array(dequantize(rows, info.kind), np.float32).reshape(info.shape)
    except (NotImplementedError, ValueError) as error:
        raise InputError(f"{name} in {path} cannot be read", got=info.kind.name) from error
    for part, key in (("attn_q", "num_attention_heads"), ("attn_k", "num_key_value_heads")):
        if f".{part}." in name:
            heads = config[key]
            if heads <= 0 or values.shape[0] % (2 * heads):
                raise InputError(f"rows of {name}", got=values.shape[0], allowed=f"{heads} heads")
            pairs = values.reshape(heads, -1, 2, *values.shape[1:])  # [heads, half, 2, in]
            values = pairs.swapaxes(1, 2).reshape(values.shape)  # [out, in]
    return torch.from_numpy(np.ascontiguousarray(values))


def _tokenizer(path: Path) -> Any:
    try:
        return transformers.AutoTokenizer.from_pretrained(
            str(path.resolve().parent), gguf_file=path.name, local_files_only=True
        )
    except Exception as error:
        # The tokenizer library raises bare Exceptions.
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"the tokenizer in {path} cannot be read", got=reason) from error
