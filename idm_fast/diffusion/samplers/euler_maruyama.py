"""Euler-Maruyama on the reverse-time variance-preserving SDE (2011.13456, eq. 6 and 11; its "predictor")."""

from __future__ import annotations

import numpy as np

from idm_fast.diffusion.samplers.ddim import ddim
from idm_fast.diffusion.table import Array, Row


def euler_maruyama(alpha: Array, sigma: Array, eta: float) -> list[Row]:
    """The SDE at eta = 1, the probability-flow ODE at eta = 0, and those between, all with the same marginals.

    alpha, sigma: [S + 1] falling noise levels, the last one the end of the walk. Backwards in time,

        dx = -beta/2 [x + (1 + eta^2) score] dt + eta sqrt(beta) dw,   score = (alpha x0_hat - x) / sigma^2

    and an explicit step with B = the integral of beta over it, which is 2 log(alpha_s / alpha_t) whatever the schedule:

        x_s = (1 + B/2 - h) x_t + h alpha_t x0_hat + eta sqrt(B) noise,   h = (1 + eta^2) B / (2 sigma_t^2)

    First order (the noisy ones: in distribution). Explicit: it needs B well below 4 a step, so tens of steps where
    ``ddim`` needs a few; it is here because it is the method of the score SDE, and to be compared with.
    The last step returns x0_hat, the denoising step that ends the paper's sampling. A step that begins at alpha = 0,
    where B is infinite, is that of ``ddim``, which is exact there. eta between 0 and 1: 2206.00364, eq. 6.
    """
    rows = ddim(alpha, sigma, eta)
    for i in range(len(alpha) - 2):
        if alpha[i] > 0:
            integral = 2 * float(np.log(alpha[i + 1] / alpha[i]))
            h = (1 + eta**2) * integral / (2 * sigma[i] ** 2)
            rows[i] = Row(i, 1 + integral / 2 - h, h * alpha[i], s=eta * integral**0.5)
    return rows
