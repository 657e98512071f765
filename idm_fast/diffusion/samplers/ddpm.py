"""DDPM ancestral sampling (2006.11239, eq. 6-7; the chain of SR3 and guided-diffusion)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import numpy as np

from idm_fast.diffusion.table import Array, Row

Variance = Literal["small", "large", "learned"]


def ddpm(alpha: Array, sigma: Array, eta: float) -> list[Row]:
    """Draws from the posterior q(x_s | x_t, x0_hat) with its own ("small") variance, beta~.

    alpha, sigma: [S + 1] falling noise levels, the last one the end of the walk; eta is 1 by definition.
    For t -> s, with alpha_ts = alpha_t / alpha_s and beta_ts = 1 - alpha_ts^2:

        mean = alpha_ts sigma_s^2/sigma_t^2 x_t + alpha_s beta_ts/sigma_t^2 x0_hat
        variance = beta_ts sigma_s^2/sigma_t^2

    On a respaced chain this is guided-diffusion's result with its betas recomputed. The last step (sigma_s = 0)
    returns x0_hat. Equal to ``ddim`` with eta = 1.
    """
    rows = []
    for i in range(len(alpha) - 1):
        alpha_ts = alpha[i] / alpha[i + 1]
        beta_ts = 1 - alpha_ts**2
        shrink = sigma[i + 1] ** 2 / sigma[i] ** 2
        a = alpha_ts * shrink
        b = alpha[i + 1] * beta_ts / sigma[i] ** 2
        rows.append(Row(i, a, b, s=(beta_ts * shrink) ** 0.5))
    return rows


def ddpm_large(alpha: Array, sigma: Array, eta: float) -> list[Row]:
    """The posterior's mean with beta_ts as the variance (guided-diffusion's ``sigma_small=False``).

    alpha, sigma, eta: as ``ddpm``. The last step (sigma_s = 0) returns x0_hat without noise.
    """
    rows = ddpm(alpha, sigma, eta)
    return [row._replace(s=_beta(alpha, row.node) ** 0.5 if sigma[row.node + 1] else 0.0) for row in rows]


def ddpm_learned(alpha: Array, sigma: Array, eta: float) -> list[Row]:
    """The posterior's mean with a variance between the two that the network chooses for each element by v in [-1, 1].

    alpha, sigma, eta: as ``ddpm``. log variance = f log beta_ts + (1 - f) log beta~ with f = (v + 1)/2 (Improved DDPM,
    2102.09672, eq. 15). With beta~ = beta_ts sigma_s^2/sigma_t^2 the standard deviation is a product,

        c exp(spread v),   c = (beta_ts beta~)^(1/4),   spread = log(beta_ts / beta~)/4 = log(sigma_t / sigma_s)/2

    so ``c`` weighs a history that holds exp(spread v) noise. The last step (sigma_s = 0) returns x0_hat without noise.
    """
    rows = []
    for row in ddpm(alpha, sigma, eta):
        i, shrink = row.node, sigma[row.node + 1] / sigma[row.node]
        if shrink == 0:
            rows.append(row._replace(s=0.0))
            continue
        rows.append(row._replace(s=0.0, c=(_beta(alpha, i) * shrink) ** 0.5, spread=-0.5 * float(np.log(shrink))))
    return rows


def _beta(alpha: Array, i: int) -> float:
    return float(1 - (alpha[i] / alpha[i + 1]) ** 2)


VARIANCES: dict[Variance, Callable[[Array, Array, float], list[Row]]] = {
    "small": ddpm,
    "large": ddpm_large,
    "learned": ddpm_learned,
}
