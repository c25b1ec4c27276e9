"""Outputs of a teacher, computed once: in memory, or in a folder that later runs read.

Outputs of a language model are too large to keep. Of each token so many classes are drawn with
their probabilities, and the share of the draws stands for them: cross-entropy with it is right on
average, which it is not with the most likely classes alone (random sampling distillation, Anshumann
et al., arXiv 2503.16870, section 3).
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from penjing.errors import InputError
from penjing.files import write_tensors
from penjing.model import Batch, Model
from penjing.transferring.spans import OTHER

__all__ = ["DRAWS", "Kept"]

# Classes drawn for a token: 256 bytes in place of 600 kB of a vocabulary of 150,000.
DRAWS = 64
# What stands for the logarithm of 0.
_NEVER = -1e4
_CLOSED, _ELSEWHERE = "the cache cannot be written", "name another folder with --cache"


class Kept:
    """A teacher's outputs by batch.

    Args:
        teacher: gives them.
        folder: where they are kept; None for memory, and of a language model not at all.
        seed: of the draws.

    Raises:
        InputError: the folder cannot be made or written.
    """

    def __init__(self, teacher: Model, folder: Path | None = None, seed: int = 0) -> None:
        self.teacher, self.folder, self._seed = teacher, folder, seed
        self._known: dict[int, Tensor] = {}
        self._teacher = b""
        if folder is None:
            return
        try:
            folder.mkdir(parents=True, exist_ok=True)
            fits = os.access(folder, os.W_OK | os.X_OK)
        except OSError as error:
            raise InputError(_CLOSED, got=error, next=_ELSEWHERE) from error
        if not fits:
            raise InputError(_CLOSED, got=f"{folder}, read-only", next=_ELSEWHERE)

    @property
    def sampled(self) -> bool:
        """Whether outputs are shares of draws."""
        return self.folder is not None and self.teacher.interface == "causal"

    @torch.no_grad()
    def __call__(self, batch: Batch, again: bool = False) -> Tensor:
        """What the teacher gives.

        Args:
            again: run it even if that is known; its states are wanted.
        """
        if again:
            return self.teacher.run(_given(self.teacher, batch))
        if id(batch) in self._known:
            return self._known[id(batch)]
        if self.folder is None:
            output = self.teacher.run(_given(self.teacher, batch))
            if self.teacher.interface != "causal":
                self._known[id(batch)] = output
            return output
        path = self.folder / f"{self._key(batch)}.safetensors"
        if not path.exists():
            output = self.teacher.run(_given(self.teacher, batch))
            kept = {"output": output.contiguous()}
            if self.sampled:
                kept = self._drawn(output, batch["attention_mask"].bool())
            write_tensors(path, kept, {}, "the teacher's outputs")
        kept = load_file(path)
        return _dense(kept, batch) if self.sampled else kept["output"]

    def _key(self, batch: Batch) -> str:
        if not self._teacher:  # its numbers, not its source: two artifacts can have one source
            digest = hashlib.sha256(f"{self._seed} {self.teacher.structure}".encode())
            for name, tensor in self.teacher.module.state_dict().items():
                digest.update(name.encode() + _bytes(tensor))
            self._teacher = digest.digest()
        digest = hashlib.sha256(self._teacher)
        for name, tensor in sorted(_given(self.teacher, batch).items()):
            digest.update(f"{name} {tuple(tensor.shape)}".encode() + _bytes(tensor))
        return digest.hexdigest()[:32]

    def _drawn(self, output: Tensor, there: Tensor) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(self._seed)
        chance = output[there].float().softmax(-1)  # [tokens, vocabulary]
        drawn = torch.multinomial(chance, DRAWS, replacement=True, generator=generator)
        return {"drawn": drawn.int(), "classes": torch.tensor(output.shape[-1])}


def _given(model: Model, batch: Batch) -> Batch:
    """A teacher's inputs: its own, where it reads the text by other tokens."""
    return {name: batch.get(f"{OTHER}{name}", batch[name]) for name in model.example}


def _bytes(tensor: Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def _dense(kept: dict[str, Tensor], batch: Batch) -> Tensor:
    """Logarithms of the shares [batch, length, vocabulary]."""
    drawn, there = kept["drawn"].long(), batch["attention_mask"].bool()
    shares = torch.zeros(len(drawn), int(kept["classes"]))
    shares.scatter_add_(1, drawn, torch.full(drawn.shape, 1 / drawn.shape[1]))
    output = torch.zeros(*there.shape, shares.shape[1])
    output[there] = shares.log().clamp_min(_NEVER)
    return output
