"""The score SDE's own solvers against a Gaussian target, whose score and marginals are known, in float64."""

from __future__ import annotations

import numpy as np
import pytest
from gaussian_target import DEVIATION, MEAN, gaussian_moments, posterior_mean, variance

from idm_fast.diffusion import Schedule, build_table


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
