"""SDE-DPM-Solver++(2M) (2211.01095, section 5 and appendix)."""

from __future__ import annotations

from idm_fast.diffusion.samplers.dpmpp_2m import half_step_ratio
from idm_fast.diffusion.table import Array, Row


def dpmpp_2m_sde(alpha: Array, sigma: Array, eta: float) -> list[Row]:
    """The multistep solver on the diffusion SDE; eta = 1 is the paper's, eta = 0 gives ``dpmpp_2m``.

    alpha, sigma: [S + 1] falling noise levels, the last one the end of the walk. With e^-h as in ``dpmpp_2m``:

        x_t = sigma_t/sigma_s e^(-eta h) x_s
            + alpha_t (1 - e^(-(1 + eta) h)) [(1 + 1/(2r)) x0_hat - 1/(2r) x0_hat_prev]
            + sigma_t sqrt(1 - e^(-2 eta h)) noise

    The paper has eta = 1; the interpolation by eta is k-diffusion's. The step to sigma = 0 returns x0_hat.
    """
    rows = []
    for i in range(len(alpha) - 1):
        shrink = (alpha[i] * sigma[i + 1]) / (sigma[i] * alpha[i + 1])
        a = sigma[i + 1] / sigma[i] * shrink**eta
        weight = alpha[i + 1] * (1 - shrink ** (1 + eta))
        half = half_step_ratio(alpha, sigma, i)
        s = sigma[i + 1] * (1 - shrink ** (2 * eta)) ** 0.5
        rows.append(Row(i, a, weight * (1 + half), c=-weight * half, s=s))
    return rows
