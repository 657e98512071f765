"""DDIM (2010.02502, eq. 12 and 16)."""

from __future__ import annotations

from idm_fast.diffusion.table import Array, Row


def ddim(alpha: Array, sigma: Array, eta: float) -> list[Row]:
    """Deterministic for eta = 0, as noisy as DDPM for eta = 1.

    alpha, sigma: [S + 1] falling noise levels, the last one the end of the walk. For t -> s, eps from x_t and x0_hat:

        x_s = alpha_s x0_hat + sqrt(sigma_s^2 - d^2) eps + d noise
        d = eta sigma_s/sigma_t sqrt(1 - (alpha_t/alpha_s)^2)

    eps follows from the clamped x0_hat (diffusers: ``use_clipped_model_output=True``).
    """
    rows = []
    for i in range(len(alpha) - 1):
        alpha_t, alpha_s, sigma_t, sigma_s = alpha[i], alpha[i + 1], sigma[i], sigma[i + 1]
        d = eta * sigma_s / sigma_t * (1 - (alpha_t / alpha_s) ** 2) ** 0.5
        a = max(sigma_s**2 - d**2, 0.0) ** 0.5 / sigma_t
        rows.append(Row(i, a, alpha_s - alpha_t * a, s=d))
    return rows
