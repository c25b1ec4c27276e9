import numpy as np
import pytest
import torch
from scipy.special import rel_entr, softmax

from penjing.losses import dkd, kl


def paper(student: np.ndarray, teacher: np.ndarray, label: int, temperature: float) -> np.ndarray:
    """The two terms of one row as Zhao et al. write them, from probabilities."""
    terms = []
    for split in (True, False):
        pairs = []
        for logits in (teacher, student):
            p = softmax(logits / temperature)
            rest = np.delete(p, label)
            pairs.append(np.array([p[label], rest.sum()]) if split else rest / rest.sum())
        terms.append(rel_entr(*pairs).sum())
    return np.array(terms)


@pytest.mark.parametrize("known", [False, True])
def test_against_the_paper(known: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, 6, 7, generator=generator) * 3
    labels = torch.randint(7, (6,), generator=generator) if known else None
    chosen = teacher.argmax(-1) if labels is None else labels
    rows = [
        paper(s, t, int(c), 4.0)
        for s, t, c in zip(student.double().numpy(), teacher.double().numpy(), chosen, strict=True)
    ]
    wanted = (np.array(rows) @ [1.0, 8.0]).mean() * 16
    assert float(dkd.loss(student, teacher, labels=labels)) == pytest.approx(wanted, rel=1e-5)


def test_of_one_row_kl_is_the_sum_with_the_weight_of_the_others() -> None:
    student, teacher = torch.tensor([[0.3, -1.0, 2.0]]), torch.tensor([[1.5, 0.2, -0.4]])
    rest = 1 - float(teacher.softmax(-1)[0, 0])
    found = dkd.loss(student, teacher, 1.0, others=rest)
    assert float(found) == pytest.approx(float(kl.loss(student, teacher)), rel=1e-6)
