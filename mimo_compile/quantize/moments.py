"""What the inputs of a linear layer are like: second moments, magnitudes, and the factor that GPTQ needs."""

from __future__ import annotations

import torch
from torch import Tensor

from mimo_compile.errors import MimoError

_DAMPING = (0.01, 0.1, 1.0)
"""Shares of the mean second moment added to the diagonal, the first that suffices."""


class Moments:
    """Sums over the inputs ``x [T, K]`` that a matrix ``[N, K]`` was multiplied with."""

    def __init__(self, k: int) -> None:
        """Start without any input."""
        self.count = 0
        """Rows seen."""
        self._square = torch.zeros((k, k))
        self._magnitude = torch.zeros(k, dtype=torch.float64)
        self._factor: Tensor | None = None

    def add(self, x: Tensor) -> None:
        """Take more inputs, ``[T, K]`` float32."""
        self._square.addmm_(x.mT, x)
        self._magnitude += x.abs().sum(0, dtype=torch.float64)
        self.count += x.shape[0]
        self._factor = None

    def join(self, other: Moments) -> None:
        """Take all that another has seen."""
        self._square += other._square
        self._magnitude += other._magnitude
        self.count += other.count
        self._factor = None

    @property
    def hessian(self) -> Tensor:
        """``mean x xᵀ [K, K]`` float32: the mean squared error of an output row is ``d H dᵀ``."""
        return self._square / max(1, self.count)

    @property
    def magnitude(self) -> Tensor:
        """``mean |x| [K]`` float32."""
        return (self._magnitude / max(1, self.count)).to(torch.float32)

    def check(self, what: str) -> None:
        """Refuse inputs that hold NaN or infinity.

        Raises:
            MimoError: they do.
        """
        if not bool(torch.isfinite(self._magnitude).all() and torch.isfinite(self._square).all()):
            raise MimoError(
                f"{what}: its inputs on the calibration text hold NaN or infinity",
                remedy="Check the checkpoint's weights, or use --calibrate rtn",
            )

    def factor(self, what: str) -> Tensor:
        """Return the upper triangular ``U [K, K]`` float32 with ``Uᵀ U = (H + damping)⁻¹``, computed once.

        With ``H = R Rᵀ`` and R upper triangular (the Cholesky factor of H read backwards) U is ``R⁻¹``: one
        factorisation and one triangular inverse in float64.

        Raises:
            MimoError: NaN or infinity, or a matrix that no damping makes positive definite.
        """
        if self._factor is None:
            self.check(what)
            self._factor = inverse_factor(self.hessian, what)
        return self._factor


def inverse_factor(hessian: Tensor, what: str = "weight") -> Tensor:
    """Return ``U`` of `Moments.factor` for a symmetric positive semi-definite matrix ``[K, K]``."""
    backwards = hessian.to(torch.float64).flip(0, 1)
    mean = float(backwards.diagonal().mean())
    if mean <= 0:  # nothing ever came in: all errors count alike
        return torch.eye(len(hessian))
    diagonal = backwards.diagonal()
    added = 0.0
    for share in _DAMPING:
        diagonal += share * mean - added
        added = share * mean
        lower, failed = torch.linalg.cholesky_ex(backwards)
        if not bool(failed):
            upper = lower.flip(0, 1)
            eye = torch.eye(len(upper), dtype=torch.float64)
            out: Tensor = torch.linalg.solve_triangular(upper, eye, upper=True)
            return out.to(torch.float32)
    raise MimoError(
        f"{what}: the second moments of its inputs are not positive definite, even damped",
        remedy="Calibrate on more text, or use --calibrate rtn",
    )


def squared_error(difference: Tensor, hessian: Tensor) -> Tensor:
    """Return the mean squared error of each output, ``[N]``, for weights that are off by ``[N, K]``."""
    return (difference @ hessian).mul_(difference).sum(-1)
