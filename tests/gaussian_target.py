"""A Gaussian target, whose denoiser, marginals and whole walks are known in float64: what tests of solvers share."""

from __future__ import annotations

from typing import Any

import numpy as np

from idm_fast.diffusion import SamplerTable

MEAN, DEVIATION = 0.3, 0.5


def posterior_mean(x: Any, alpha: Any, sigma: Any) -> Any:
    """E[x0 | x] for x0 ~ N(MEAN, DEVIATION^2): the exact denoiser."""
    gain = alpha * DEVIATION**2 / (alpha**2 * DEVIATION**2 + sigma**2)
    return MEAN + gain * (x - alpha * MEAN)


def variance(alpha: Any, sigma: Any) -> Any:
    return alpha**2 * DEVIATION**2 + sigma**2


def gaussian_moments(table: SamplerTable) -> tuple[float, float]:
    """Mean and variance of the walk's end; exact, because update and denoiser are linear in (x, history)."""
    mean = np.array([table.alpha_start * MEAN, 0.0])
    covariance = np.diag([variance(table.alpha_start, table.sigma_start), 0.0])
    for e, (_, _, a, b, c, s, _, _) in enumerate(table.rows.tolist()):
        offset = posterior_mean(0.0, table.alpha[e], table.sigma[e])
        gain = posterior_mean(1.0, table.alpha[e], table.sigma[e]) - offset
        matrix = np.array([[a + b * gain, c], [gain, 0]])
        mean = matrix @ mean + offset * np.array([b, 1])
        covariance = matrix @ covariance @ matrix.T
        covariance[0, 0] += s**2
    return float(mean[0]), float(covariance[0, 0])
