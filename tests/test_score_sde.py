"""The score SDE's own solvers against a Gaussian target, whose score and marginals are known, in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from idm_fast.diffusion import SamplerTable, Schedule, build_table

MEAN, DEVIATION = 0.3, 0.5  # of the target


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


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize(("schedule", "start"), [(Schedule.continuous_cosine(), 0.9), (Schedule.vp_sde(), 1.0)])
def test_the_score_sde_converges_at_first_order(eta: float, schedule: Schedule, start: float) -> None:
    """Mean and variance of the walk's end. (Where the cosine begins beta is infinite, and the order lower.)"""
    errors = []
    for steps in (200, 400, 800):
        table = build_table(schedule, "x0", "euler_maruyama", steps, start=start, eta=eta)
        mean, var = gaussian_moments(table)
        errors.append((abs(mean - MEAN), abs(var - DEVIATION**2)))
    ratios = np.array(errors[:-1]) / np.array(errors[1:])
    np.testing.assert_allclose(ratios, 2, atol=0.25)
    assert max(errors[-1]) < 5e-3


def test_the_ode_s_euler_is_the_sde_without_noise() -> None:
    rows = build_table(Schedule.vp_sde(), "x0", "pf_ode", 9).rows
    np.testing.assert_array_equal(rows, build_table(Schedule.vp_sde(), "x0", "euler_maruyama", 9, eta=0.0).rows)


def test_one_euler_maruyama_step_by_hand() -> None:
    """Against the drift and the diffusion of the linear VP-SDE, beta(t) = 0.1 + 19.9 t, over a short step."""
    schedule, t, s = Schedule.vp_sde(), 0.4, 0.399
    table = build_table(schedule, "x0", "euler_maruyama", timesteps=[t, s])
    alpha, sigma = np.exp(-(t**2) * 19.9 / 4 - t * 0.05), np.sqrt(1 - np.exp(-(t**2) * 19.9 / 2 - t * 0.1))
    beta, x, x0 = 0.1 + 19.9 * (t + s) / 2, 0.7, -0.2  # its mean over the step
    expected = x + (t - s) * beta * (x / 2 + (alpha * x0 - x) / sigma**2)
    _, _, a, b, c, noise, _, _ = table.rows[0].tolist()
    assert a * x + b * x0 == pytest.approx(expected, rel=1e-12)
    assert (c, noise) == (0, pytest.approx((beta * (t - s)) ** 0.5, rel=1e-12))


def test_the_corrector_settles_at_its_level() -> None:
    """From a wrong mean and variance; its known bias included. The walk around it is the same."""
    snr, steps = 0.1, 1200
    schedule = Schedule.vp_sde()
    table = build_table(schedule, "x0", "ddpm", timesteps=[0.5, 0.3], corrector_steps=steps, corrector_snr=snr)
    assert table.evaluations == 2 + steps
    assert set(table.network_time[1:]) == {300.0}
    plain = build_table(schedule, "x0", "ddpm", timesteps=[0.5, 0.3])
    np.testing.assert_array_equal(table.rows[[0, -1]], plain.rows)
    alpha, sigma = (float(level) for level in schedule.alpha_sigma(0.3))
    mean, spread = 2.0, 3.0
    for _, _, a, b, c, s, _, _ in table.rows[1:-1].tolist():
        assert c == 0
        offset = posterior_mean(0.0, alpha, sigma)
        gain = posterior_mean(1.0, alpha, sigma) - offset
        mean, spread = (a + b * gain) * mean + b * offset, (a + b * gain) ** 2 * spread + s**2
    exact, epsilon = variance(alpha, sigma), 2 * snr**2 * sigma**2
    assert mean == pytest.approx(alpha * MEAN, abs=1e-4)
    assert spread == pytest.approx(exact / (1 - epsilon / (2 * exact)), rel=1e-4)
