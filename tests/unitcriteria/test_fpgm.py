import numpy as np
import torch
from scipy.optimize import minimize

from penjing.unitcriteria import fpgm
from penjing.unitcriteria._view import View


def test_sums_of_distances_by_brute_force() -> None:
    rows = torch.randn(9, 5, generator=torch.Generator().manual_seed(0))
    x = rows.double().numpy()
    sums = np.array([sum(np.linalg.norm(a - b) for b in x) for a in x])
    found = fpgm.score(View((rows,), (), ())).numpy()
    np.testing.assert_allclose(found, sums / sums.sum(), rtol=1e-6)


def test_the_first_to_go_is_the_one_nearest_to_the_geometric_median() -> None:
    for seed in range(5):
        rows = torch.randn(40, 2, generator=torch.Generator().manual_seed(seed))
        x = rows.double().numpy()
        median = minimize(
            lambda m, x=x: np.linalg.norm(x - m, axis=1).sum(), x.mean(0), method="Nelder-Mead",
            options={"xatol": 1e-8, "fatol": 1e-8},
        ).x  # fmt: skip
        near = np.linalg.norm(x - median, axis=1).argsort()[:2]
        assert int(fpgm.score(View((rows,), (), ())).argmin()) in near
