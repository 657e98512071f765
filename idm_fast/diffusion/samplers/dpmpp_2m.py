"""DPM-Solver++(2M) (2211.01095, algorithm 2)."""

from __future__ import annotations

import numpy as np

from idm_fast.diffusion.table import Array, Row


def half_step_ratio(alpha: Array, sigma: Array, i: int) -> float:
    """1/(2 r) = h/(2 h_prev) of step i, h the step in lambda = log(alpha/sigma): weight of x0_hat - x0_hat_prev.

    0 means first order: at the first step (no history), after a start at alpha = 0 (h_prev infinite), and at a last
    step to sigma = 0 (h infinite; 2M is not defined there, and the paper lowers the order too).
    """
    if i == 0 or sigma[i + 1] == 0 or alpha[i - 1] == 0:
        return 0.0
    previous, now, following = np.log(alpha[i - 1 : i + 2] / sigma[i - 1 : i + 2])
    return float((following - now) / (2 * (now - previous)))


def dpmpp_2m(alpha: Array, sigma: Array, eta: float) -> list[Row]:
    """Second order at one evaluation a step, by remembering the previous x0_hat.

    alpha, sigma: [S + 1] falling noise levels, the last one the end of the walk; eta is 0 by definition.

        x_t = sigma_t/sigma_s x_s + alpha_t (1 - e^-h) [(1 + 1/(2r)) x0_hat - 1/(2r) x0_hat_prev]

    with e^-h = (alpha_s sigma_t)/(sigma_s alpha_t), taken as that ratio so that both ends may be infinite in lambda.
    """
    rows = []
    for i in range(len(alpha) - 1):
        a = sigma[i + 1] / sigma[i]
        weight = alpha[i + 1] - alpha[i] * a
        half = half_step_ratio(alpha, sigma, i)
        rows.append(Row(i, a, weight * (1 + half), c=-weight * half))
    return rows
