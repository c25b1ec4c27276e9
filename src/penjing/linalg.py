"""Sums over calibration data, and least squares on them, in float64.

    Gram matrix        G = sum over tokens of x^T x / tokens                       [in, in]
    damping            G + lambda I, lambda = damping * mean diagonal of the live inputs
    ridge              argmin over B of ||X B - Y||^2 / n + lambda ||B - T||^2
                         = (G + lambda I)^-1 (C + lambda T),  C = X^T Y / n
    GPTQ's factor      upper U with U^T U = (G + lambda I)^-1   (Frantar et al., arXiv 2210.17323)

A dead input, one that was always zero, has its diagonal set to 1: data say nothing of it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from penjing.errors import InputError

__all__ = [
    "Cross",
    "Gram",
    "Sums",
    "affine_ridge",
    "asymmetric_target",
    "damped_cholesky",
    "inverse_cholesky_upper",
    "masked_least_squares",
    "ridge",
    "state",
]

# Tokens multiplied in float32 before the float64 sum: relative rounding stays near 1e-6.
_CHUNK = 2048
_RETRIES = 6

# Of y^T x and of y, by address, shape and strides of both.
Sums = dict[tuple[int, ...], tuple[Tensor, Tensor]]


def _check_finite(what: str, *tensors: Tensor | None) -> None:
    for tensor in tensors:
        if tensor is not None and not _is_finite(tensor):
            raise InputError(
                f"{what} has NaN or infinite values",
                next="check the weights and the calibration data",
            )


def _is_finite(tensor: Tensor) -> bool:
    """Of all values; a sum is read faster, and finite only if they are."""
    return bool(torch.isfinite(tensor.sum())) or bool(torch.isfinite(tensor).all())


def state(tensor: Tensor) -> tuple[int, ...]:
    """Tells living tensors apart, and what one holds before and after a change in place."""
    version = -1 if tensor.is_inference() else tensor._version
    return tensor.data_ptr(), version, *tensor.shape, *tensor.stride()


class Gram:
    """The mean of x^T x over all tokens added, float64.

    Chunks of 2048 tokens are multiplied in float32 and summed in float64, in the order of the
    calls: the same calls give the same bits. A chunk whose squares overflow float32 is
    multiplied in float64.

    Args:
        width: inputs.
    """

    def __init__(self, width: int) -> None:
        self.width = width
        self._own = Cross(width)

    @property
    def count(self) -> int:
        """Tokens added."""
        return self._own.count

    def add(self, x: Tensor, memo: Sums | None = None) -> None:
        """Add tokens.

        Args:
            x: [..., width], any float type.
            memo: sums that are known, for layers that read the same x; the caller keeps every x
                alive while it keeps the memo.

        Raises:
            InputError: another width, or NaN or infinite values; nothing is added then.
        """
        if x.ndim == 0 or x.shape[-1] != self.width:
            raise InputError(
                "width of the inputs", got=tuple(x.shape), allowed=f"[..., {self.width}]"
            )
        x = x.detach().reshape(-1, self.width)  # [tokens, width]
        self._own.add(x, x, memo)

    @property
    def matrix(self) -> Tensor:
        """[width, width] float64: sum of x^T x / count.

        Raises:
            InputError: nothing was added.
        """
        self._check_count()
        return self._own.matrix

    @property
    def mean(self) -> Tensor:
        """[width] float64.

        Raises:
            InputError: nothing was added.
        """
        self._check_count()
        return self._own.mean

    @property
    def norm(self) -> Tensor:
        """[width] float32: root mean square of each input.

        Raises:
            InputError: nothing was added.
        """
        self._check_count()
        return self._own.matrix.diagonal().sqrt().float()

    def _check_count(self) -> None:
        if not self.count:
            raise InputError(
                "no calibration data reached a layer", next="give more, or other, samples"
            )


class Cross:
    """The mean of y^T x over all pairs of tokens added, float64; sums as `Gram`.

    Args:
        width: of y and of x.

    Attributes:
        count: pairs added.
    """

    def __init__(self, width: int) -> None:
        self.count = 0
        self._sum = torch.zeros(width, width, dtype=torch.float64)
        self._first = torch.zeros(width, dtype=torch.float64)

    def add(self, y: Tensor, x: Tensor, memo: Sums | None = None) -> None:
        """Add pairs of rows y, x [tokens, width]; `memo` as in `Gram.add`."""
        place = (*state(y), *state(x))
        if memo is None or place not in memo:
            _check_finite("a layer's input", y)
            found = _outer(y, x), y.sum(0, dtype=torch.float64)
            if memo is not None:
                memo[place] = found
        else:
            found = memo[place]
        self._sum += found[0]
        self._first += found[1]
        self.count += len(x)

    @property
    def matrix(self) -> Tensor:
        """[width, width] float64: sum of y^T x / count."""
        return self._sum / self.count

    @property
    def mean(self) -> Tensor:
        """[width] float64, of y."""
        return self._first / self.count


def _outer(y: Tensor, x: Tensor) -> Tensor:
    """Sum of y^T x over rows [tokens, width]: chunks in float32, more than one in float64."""
    total: Tensor | None = None
    # A network may ask for products in fewer bits; these are ours.
    with torch.autocast(x.device.type, enabled=False):
        for start in range(0, len(x), _CHUNK):
            rows = slice(start, start + _CHUNK)
            product = y[rows].float().T @ x[rows].float()
            if not _is_finite(product):
                product = y[rows].double().T @ x[rows].double()
            total = product if total is None else total.double() + product
    return torch.zeros(y.shape[1], x.shape[1]) if total is None else total


def asymmetric_target(
    weight: Tensor, gram: Tensor, cross: Tensor, alpha: float = 0.5, damping: float = 0.01
) -> Tensor:
    """The weight that on the edited network's inputs gives what the original gave on its own.

        W* = W + alpha W (C - H) (H + lambda I)^-1

    With alpha = 1 this is the least-squares solution (GPTAQ, arXiv 2504.02692); half of the way
    generalises better from small calibration sets.

    Args:
        weight: [out, in].
        gram: H [in, in], of the edited network's inputs.
        cross: C [in, in], original's inputs by edited ones.
        alpha: how far to go, 0 to 1.
        damping: lambda as a fraction of the mean diagonal.

    Returns:
        float32 [out, in].

    Raises:
        InputError: as `damped_cholesky`.
    """
    lower, _, dead = _factor(gram, damping)
    change = (weight.double() @ (cross - gram)).T  # [in, out]
    change[dead] = 0
    solved: Tensor = torch.cholesky_solve(change, lower)
    return (weight.double() + alpha * solved.T).float()


def _factor(matrix: Tensor, damping: float) -> tuple[Tensor, float, Tensor]:
    """Lower factor of the damped matrix, the lambda that made it definite, the dead inputs."""
    _check_finite("a Gram matrix", matrix)
    matrix = matrix.double()
    matrix = (matrix + matrix.T) / 2
    diagonal = matrix.diagonal()
    dead = diagonal == 0
    live = diagonal[~dead]
    mean = float(live.mean()) if len(live) else 1.0
    if bool((live < 0).any()):
        raise InputError("a Gram matrix has a negative diagonal", got=float(live.min()))
    for attempt in range(_RETRIES):
        # Without damping the first retry has nothing to multiply; it starts at rounding level.
        strength = damping * 10**attempt if damping else 1e-12 * 100**attempt * (attempt > 0)
        damped = matrix + torch.diag(dead.double() + strength * mean)
        lower, info = torch.linalg.cholesky_ex(damped)
        if not int(info) and bool(torch.isfinite(lower).all()):
            return lower, strength * mean, dead
    raise InputError(
        "a Gram matrix is not positive definite",
        got=f"damping up to {strength:g} of its mean diagonal",
        next="give more calibration data",
    )


def damped_cholesky(matrix: Tensor, damping: float = 0.01) -> Tensor:
    """Lower L with L L^T = matrix + lambda I, float64; lambda grows tenfold until it exists.

    Args:
        matrix: [n, n], positive semi-definite; left as it is.
        damping: lambda as a fraction of the mean diagonal.

    Raises:
        InputError: NaN or infinite values, or not definite after six tries.
    """
    return _factor(matrix, damping)[0]


def inverse_cholesky_upper(matrix: Tensor, damping: float = 0.01) -> Tensor:
    """Upper U with U^T U = (matrix + lambda I)^-1, float64 [n, n].

    With J the reversal of rows, J matrix J = L L^T gives matrix = R R^T for the upper
    R = J L J, so U = R^-1 without ever forming the inverse.

    Raises:
        InputError: as `damped_cholesky`.
    """
    upper = damped_cholesky(matrix.flip(0, 1), damping).flip(0, 1)
    eye = torch.eye(len(matrix), dtype=torch.float64)
    inverse: Tensor = torch.linalg.solve_triangular(upper, eye, upper=True)
    return inverse


def ridge(
    gram: Tensor, cross: Tensor, strength: float = 0.01, toward: Tensor | None = None
) -> Tensor:
    """Least squares held to a prior: argmin ||X B - Y||^2 / n + lambda ||B - toward||^2.

    Args:
        gram: [k, k], X^T X / n.
        cross: [k, out], X^T Y / n.
        strength: lambda as a fraction of the mean diagonal of `gram`.
        toward: [k, out]; zero when None. A dead input gets its row of it.

    Returns:
        B, float64 [k, out].

    Raises:
        InputError: shapes that do not fit, NaN or infinite values.
    """
    prior = torch.zeros_like(cross) if toward is None else toward
    k = cross.shape[0]
    if gram.shape != (k, k) or prior.shape != cross.shape:
        got = [tuple(t.shape) for t in (gram, cross, prior)]
        raise InputError("shapes of a ridge", got=got, allowed="[k, k], [k, out], [k, out]")
    _check_finite("a least-squares problem", cross, prior)
    lower, added, dead = _factor(gram, strength)
    prior = prior.double()
    right = cross.double() + added * prior  # [k, out]
    right[dead] = (1 + added) * prior[dead]
    solved: Tensor = torch.cholesky_solve(right, lower)
    return solved


def masked_least_squares(
    target: Tensor,
    gram: Tensor,
    mask: Tensor,
    start: Tensor,
    steps: int = 12,
    damping: float = 0.01,
) -> Tensor:
    """The best weight with some connections: argmin tr((W - target) H (W - target)^T) on a mask.

    Conjugate gradients on all rows at once, preconditioned by the diagonal of H, each row with
    its own step lengths; H is damped, toward the target.

    Args:
        target: [out, in].
        gram: H [in, in].
        mask: bool [out, in], True stays.
        start: [out, in], where to begin; removed connections count as zero.
        steps: of conjugate gradients; `in` of them solve it exactly.
        damping: lambda as a fraction of the mean diagonal.

    Returns:
        float32 [out, in], zero outside the mask.
    """
    _check_finite("a least-squares problem", target, gram, start)
    diagonal = gram.diagonal()
    live = diagonal[diagonal > 0]
    added = damping * float(live.mean()) if len(live) else 1.0
    whole = gram.float() if gram.dtype != torch.float32 else gram.clone()
    whole.diagonal().copy_(diagonal + added)
    inverse = 1 / whole.diagonal()  # [in]
    keep = mask.to(torch.float32)
    weight = start.float() * keep
    residual = ((target.float() - weight) @ whole) * keep
    scaled = residual * inverse
    direction = scaled
    size = (residual * scaled).sum(1, keepdim=True)  # [out, 1]
    for _ in range(steps):
        image = (direction @ whole) * keep
        length = size / (direction * image).sum(1, keepdim=True).clamp_min(1e-30)
        weight = weight + length * direction
        residual = residual - length * image
        scaled = residual * inverse
        now = (residual * scaled).sum(1, keepdim=True)
        direction = scaled + (now / size.clamp_min(1e-30)) * direction
        size = now
    return weight


def affine_ridge(
    count: int,
    sum_x: Tensor,
    sum_y: Tensor,
    gram_xx: Tensor,
    cross_xy: Tensor,
    strength: float = 0.01,
    toward: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The linear map with a bias that fits y = x @ weight.T + bias, held to `toward`.

    The data are centred, so the bias is free and only the weight is held.

    Args:
        count: tokens.
        sum_x: [in], sum of x over the tokens.
        sum_y: [out], sum of y.
        gram_xx: [in, in], sum of x^T x (a sum, not a mean).
        cross_xy: [in, out], sum of x^T y.
        strength: of the ridge, relative to the mean variance of x.
        toward: [out, in], e.g. the identity; zero when None.

    Returns:
        weight [out, in] and bias [out], float64.

    Raises:
        InputError: no tokens, shapes that do not fit, NaN or infinite values.
    """
    if count < 1:
        raise InputError("no calibration data for a linear patch", got=count)
    _check_finite("a linear patch", sum_x, sum_y, gram_xx, cross_xy)
    mean_x, mean_y = sum_x.double() / count, sum_y.double() / count
    gram = gram_xx.double() / count - torch.outer(mean_x, mean_x)  # [in, in]
    cross = cross_xy.double() / count - torch.outer(mean_x, mean_y)  # [in, out]
    # A constant input has a variance of rounding noise around zero.
    noise = gram.diagonal() <= 1e-12 * gram_xx.diagonal().double() / count
    gram[noise], gram[:, noise], cross[noise] = 0.0, 0.0, 0.0
    weight = ridge(gram, cross, strength, None if toward is None else toward.T).T
    return weight, mean_y - weight @ mean_x
