import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from penjing.errors import InputError
from penjing.model import Model, Source
from penjing.runtimes import onnxruntime as runtime
from penjing.writers import onnx as writer


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> tuple[Model, runtime.Session]:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=48, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2,
    )  # fmt: skip
    ids = torch.randint(48, (2, 6))
    example = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    module = LlamaForCausalLM(config).eval()
    model = Model(module, "causal", example, Source("huggingface", "tiny", "0"))
    path = tmp_path_factory.mktemp("decoder") / "model.onnx"
    writer.write(model, path)
    return model, runtime.open(path, threads=1)


def test_steps_through_the_cache_equal_one_pass(decoder: tuple[Model, runtime.Session]) -> None:
    model, session = decoder
    ids = torch.randint(48, (3, 10))
    with torch.no_grad():
        wanted = model.run({"input_ids": ids, "attention_mask": torch.ones_like(ids)}).numpy()
    got, past = [], None
    for start, end in ((0, 4), (4, 5), (5, 8), (8, 10)):
        batch = {"input_ids": ids[:, start:end].numpy(), "attention_mask": np.ones((3, end))}
        logits, past = session.step(batch, past)
        got.append(logits)
    assert np.abs(np.concatenate(got, axis=1) - wanted).max() < 1e-4
    assert past is not None
    assert all(x.shape == (3, 2, 10, 8) for x in past.values())


def test_greedy_generation_is_torchs(decoder: tuple[Model, runtime.Session]) -> None:
    model, session = decoder
    prompt = torch.tensor([[3, 1, 4, 1, 5]])
    wanted = model.module.generate(
        prompt, max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0
    )[0].tolist()
    tokens, new, past = prompt[0].tolist(), prompt.numpy(), None
    for _ in range(12):
        mask = np.ones((1, len(tokens)))
        logits, past = session.step({"input_ids": new, "attention_mask": mask}, past)
        tokens.append(int(logits[0, -1].argmax()))
        new = np.array([[tokens[-1]]])
    assert tokens == wanted


def test_inputs_and_cache_are_listed(decoder: tuple[Model, runtime.Session]) -> None:
    _, session = decoder
    assert session.inputs["input_ids"] == (None, None)
    assert session.inputs["past_key_values.1.value"] == (None, 2, None, 8)
    assert len(session.cache) == 4


def test_bad_input_is_an_error_in_words(
    decoder: tuple[Model, runtime.Session], tmp_path: Path
) -> None:
    _, session = decoder
    with pytest.raises(InputError, match="attention_mask is missing"):
        session.run({"input_ids": np.ones((1, 2))})
    with pytest.raises(InputError, match="refuses the batch"):
        session.run({"input_ids": np.ones(3), "attention_mask": np.ones((1, 3))})
    with pytest.raises(InputError, match="no such ONNX file"):
        runtime.open(tmp_path / "none.onnx", threads=1)
    (tmp_path / "bad.onnx").write_bytes(b"not a graph")
    with pytest.raises(InputError, match="cannot load"):
        runtime.open(tmp_path / "bad.onnx", threads=1)


def test_a_light_process_stays_light() -> None:
    code = (
        "import sys, penjing.runtimes.onnxruntime; "
        "print([m for m in ('torch', 'transformers') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
