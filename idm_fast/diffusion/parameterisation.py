"""What the network predicts, and how x0_hat follows from it. With x = alpha x0 + sigma eps:

| name | output                                                    | x0_hat                        |
|------|-----------------------------------------------------------|-------------------------------|
| eps  | eps (DDPM, eq. 15)                                        | x / alpha - (sigma/alpha) out |
| v    | alpha eps - sigma x0 (progressive distillation, 2202.00512, app. D) | alpha x - sigma out  |
| x0   | x0                                                        | out                           |
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import numpy.typing as npt
from torch import Tensor

from idm_fast.errors import IdmFastError

Array = npt.NDArray[np.float64]
Parameterisation = Literal["eps", "v", "x0"]
PARAMETERISATIONS: tuple[Parameterisation, ...] = ("eps", "v", "x0")
MIN_ALPHA_EPS = 1e-6  # below it 1/alpha turns fp32 rounding of (x - sigma eps) into a visible error of x0_hat


def check(parameterisation: str) -> None:
    """Raises ``IdmFastError`` unless it is one of ``PARAMETERISATIONS``."""
    if parameterisation not in PARAMETERISATIONS:
        names = ", ".join(PARAMETERISATIONS)
        raise IdmFastError(f"parameterisation must be one of {names}, got {parameterisation!r}")


def x0_coefficients(parameterisation: Parameterisation, alpha: Array, sigma: Array) -> tuple[Array, Array]:
    """(k_x, k_out) in float64 with x0_hat = k_x * x + k_out * out; shapes of alpha and sigma.

    Errors: ``IdmFastError`` for an unknown name, or for eps where alpha < 1e-6 (x then holds nothing of x0).
    """
    check(parameterisation)
    if parameterisation == "x0":
        return np.zeros_like(alpha), np.ones_like(alpha)
    if parameterisation == "v":
        return alpha, -sigma
    if float(np.min(alpha)) < MIN_ALPHA_EPS:
        raise IdmFastError(
            f"parameterisation: eps needs alpha >= {MIN_ALPHA_EPS:g} at every step, got {float(np.min(alpha)):g}; "
            "begin lower (start or t_max below 1) or predict v or x0"
        )
    return 1 / alpha, -sigma / alpha


def x0_from_output(parameterisation: Parameterisation, x: Tensor, out: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """x0_hat on tensors, differentiable, for losses; alpha and sigma broadcast against x [N, C, H, W]."""
    check(parameterisation)
    if parameterisation == "x0":
        return out
    if parameterisation == "v":
        return alpha * x - sigma * out
    return (x - sigma * out) / alpha


def target(parameterisation: Parameterisation, x0: Tensor, eps: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """What the network should output for x = alpha x0 + sigma eps: the regression target of training."""
    check(parameterisation)
    if parameterisation == "x0":
        return x0
    if parameterisation == "v":
        return alpha * eps - sigma * x0
    return eps


def eps_from_x0(x: Tensor, x0: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """eps = (x - alpha x0) / sigma; sigma > 0."""
    return (x - alpha * x0) / sigma
