"""DDPM ancestral sampling (2006.11239, eq. 6-7; the chain of SR3 and guided-diffusion)."""

from __future__ import annotations

from idm_fast.diffusion.table import Array, Row


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
