"""Two language models of different tokenizers on one text: which of their tokens cover the same.

A span is the text between two places where tokens of both end. Where a span is one token to both
and spelled alike, their distributions are compared, over the tokens that both vocabularies spell
alike and one class for all others; of every other span its probability,

    log p(span) = sum over its tokens of log p(token | those before)

as that of a coin: p log(p / q) + (1 - p) log((1 - p) / (1 - q)), p the teacher's. Probabilities of
spans are those of Approximate Likelihood Matching (Minixhofer et al., arXiv 2503.20083, section 3).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from penjing.errors import InputError
from penjing.model import Batch, Model

__all__ = ["OTHER", "SPANS", "Bridge", "differ", "spans_of"]

SPANS = "spans"
"""Of a batch: int64 [n, 5], sample, first and last token of the student's, of the teacher's."""
OTHER = "teacher."
"""Before the names of the teacher's own inputs in a batch."""

# Probabilities of 0 and 1 have no logarithm that can be compared.
_LEAST, _MOST = -1e4, -1e-6


def differ(student: Model, teacher: Model) -> bool:
    """Whether both have tokenizers, and not one vocabulary."""
    one, two = student.tokenizer, teacher.tokenizer
    return one is not None and two is not None and one.get_vocab() != two.get_vocab()


def spans_of(student: Sequence[int], teacher: Sequence[int]) -> list[tuple[int, int, int, int]]:
    """First and last token of every span, of the student's and of the teacher's.

    Args:
        student, teacher: where in the text each token ends, in characters; 0 for special ones.
    """
    own, other = ({end: n for n, end in enumerate(ends) if end} for ends in (student, teacher))
    common = sorted(set(own) & set(other))
    found = []
    for before, end in pairwise([0, *common]):
        # Behind the last token of the text before: pieces of one character end at one place.
        parts = []
        for ends, last in ((student, own), (teacher, other)):
            first = last[before] + 1 if before else next(n for n, e in enumerate(ends) if e)
            parts += [first, last[end]]
        found.append((parts[0], parts[1], parts[2], parts[3]))
    return found


class Bridge:
    """Batches for both, and how far a student is from its teacher on them.

    Args:
        student, teacher: language models with tokenizers that know where their tokens stand.
    """

    def __init__(self, student: Model, teacher: Model) -> None:
        self.student, self.teacher = student, teacher
        spelled = [_spelled(model) for model in (student, teacher)]
        shared = sorted(set(spelled[0]) & set(spelled[1]))
        self._own, self._theirs = (torch.tensor([own[text] for text in shared], dtype=torch.long)
                                   for own in spelled)  # fmt: skip
        self._alike = dict(zip(self._own.tolist(), self._theirs.tolist(), strict=True))

    def encode(self, texts: Sequence[str], length: int, size: int) -> Iterator[Batch]:
        """Batches of pieces of texts, each of about `length` of the student's tokens.

        Raises:
            InputError: a tokenizer that does not say where its tokens stand.
        """
        pieces = [piece for text in texts for piece in self._pieces(text, length)]
        pieces.sort(key=len)
        for start in range(0, len(pieces), size):
            chosen = pieces[start : start + size]
            (own, ends), (theirs, others) = (
                self._tokens(model, chosen, length) for model in (self.student, self.teacher)
            )
            rows = [
                (sample, *span)
                for sample, pair in enumerate(zip(ends, others, strict=True))
                for span in spans_of(*pair)
                if span[0] and span[2]  # nothing predicts the first token
            ]
            if rows:
                batch = own | {f"{OTHER}{name}": value for name, value in theirs.items()}
                yield batch | {SPANS: torch.tensor(rows)}

    def _pieces(self, text: str, length: int) -> Iterator[str]:
        ends = _ends(self.student, [text], None)[1][0]
        start = 0
        for n in range(length, len(ends) + length, length):
            end = max(ends[:n])
            if end > start:
                yield text[start:end]
            start = max(start, end)

    def _tokens(
        self, model: Model, texts: Sequence[str], length: int
    ) -> tuple[Batch, list[list[int]]]:
        found, ends = _ends(model, texts, model.at_most(2 * length))
        width = max(map(len, found))
        ids, mask = np.zeros((len(found), width), np.int64), np.zeros((len(found), width), np.int64)
        for row, tokens in enumerate(found):
            ids[row, : len(tokens)], mask[row, : len(tokens)] = tokens, 1
        return {"input_ids": torch.from_numpy(ids), "attention_mask": torch.from_numpy(mask)}, ends

    def distance(self, output: Tensor, wanted: Tensor, batch: Batch) -> Tensor:
        """Scalar, in nats: mean over spans.

        Args:
            output, wanted: logits of the student and of the teacher [batch, length, vocabulary].
        """
        sample, *places = batch[SPANS].unbind(1)
        s, t = output.float().log_softmax(-1), wanted.float().log_softmax(-1)
        ids = batch["input_ids"], batch[f"{OTHER}input_ids"]
        first = ids[0][sample, places[0]], ids[1][sample, places[2]]
        single = torch.tensor([
            a == b and c == d and self._alike.get(x) == y
            for a, b, c, d, x, y in zip(*(p.tolist() for p in places), *(f.tolist() for f in first),
                                        strict=True)
        ], device=output.device)  # fmt: skip
        rows = sample[single]
        total = _divergence(_coarse(t[rows, places[2][single] - 1], self._theirs),
                            _coarse(s[rows, places[0][single] - 1], self._own))  # fmt: skip
        rest = ~single
        chances = [
            _of_spans(x, own, sample[rest], a[rest], b[rest])
            for x, own, (a, b) in ((t, ids[1], places[2:]), (s, ids[0], places[:2]))
        ]
        coins = [torch.stack([c, _complement(c)], -1) for c in chances]  # [spans, 2]
        return (total + _divergence(*coins)) / len(sample)


def _divergence(wanted: Tensor, own: Tensor) -> Tensor:
    return (wanted.exp() * (wanted - own)).sum()


def _coarse(logs: Tensor, shared: Tensor) -> Tensor:
    """[n, vocabulary] to [n, shared + 1], the last for all others."""
    others = logs.index_fill(1, shared.to(logs.device), -torch.inf).logsumexp(1, keepdim=True)
    return torch.cat([logs[:, shared], others], 1).clamp_min(_LEAST)


def _of_spans(logs: Tensor, ids: Tensor, sample: Tensor, first: Tensor, last: Tensor) -> Tensor:
    """log p of each span, of its tokens behind what stands before."""
    each = logs[:, :-1].gather(2, ids[:, 1:, None]).squeeze(2)  # [batch, length - 1]
    sums = torch.nn.functional.pad(each.cumsum(1), (1, 0))  # of the tokens up to each
    return (sums[sample, last] - sums[sample, first - 1]).clamp(_LEAST, _MOST)


def _complement(log: Tensor) -> Tensor:
    """log(1 - exp(log))."""
    return (-torch.expm1(log)).log()


def _ends(
    model: Model, texts: Sequence[str], most: int | None
) -> tuple[list[list[int]], list[list[int]]]:
    """Tokens of each text, and where each ends, 0 for special ones."""
    tokenizer: Any = model.tokenizer
    if not getattr(tokenizer, "is_fast", False):
        raise InputError(
            "a tokenizer that does not say where its tokens stand", got=type(tokenizer).__name__,
            allowed="one with a tokenizer.json, where student and teacher have different ones",
        )  # fmt: skip
    cut: dict[str, Any] = {} if most is None else {"truncation": True, "max_length": most}
    found = tokenizer(
        list(texts), return_offsets_mapping=True, return_special_tokens_mask=True, verbose=False,
        **cut,
    )  # fmt: skip
    ends = [
        [0 if special else end for (_, end), special in zip(offsets, specials, strict=True)]
        for offsets, specials in zip(
            found["offset_mapping"], found["special_tokens_mask"], strict=True
        )
    ]
    return found["input_ids"], ends


def _spelled(model: Model) -> dict[str, int]:
    """Tokens by what they stand for; marks of a space are spaces."""
    special = set(model.tokenizer.all_special_tokens)
    vocabulary = model.tokenizer.get_vocab()
    return {
        text.replace("\u0120", " ").replace("\u2581", " "): number
        for text, number in sorted(vocabulary.items()) if text not in special
    }  # fmt: skip
