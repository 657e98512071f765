"""Schedules, spacings, respaced chains and the three parameterisations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from idm_fast.config import PRESETS, DiffusionConfig
from idm_fast.diffusion import PARAMETERISATIONS, SPACINGS, Schedule, respace
from idm_fast.diffusion.parameterisation import eps_from_x0, target, x0_coefficients, x0_from_output
from idm_fast.errors import IdmFastError

SCHEDULES = {
    "linear": Schedule.linear(),
    "linear_sr3": Schedule.linear(1e-6, 1e-2, 2000, conditioning="noise_level"),
    "scaled_linear": Schedule.scaled_linear(),
    "cosine": Schedule.cosine(),
    "table": Schedule.from_alphas_cumprod([0.99, 0.9, 0.5, 0.1, 0.0]),
    "continuous_cosine": Schedule.continuous_cosine(),
    "vp_sde": Schedule.vp_sde(),
}
every_schedule = pytest.mark.parametrize("name", SCHEDULES)


def top(schedule: Schedule) -> float:
    return schedule.t_max if schedule.size is None else schedule.size - 1


@every_schedule
def test_alpha_and_sigma_are_on_the_unit_circle_and_monotonic(name: str) -> None:
    schedule = SCHEDULES[name]
    t = np.linspace(0, top(schedule), 777)
    alpha, sigma = schedule.alpha_sigma(t)
    assert alpha.dtype == sigma.dtype == np.float64
    np.testing.assert_allclose(alpha**2 + sigma**2, 1, rtol=0, atol=1e-15)
    assert np.all(np.diff(alpha) <= 0)
    assert np.all(np.diff(sigma) >= 0)
    assert schedule.alpha_sigma(float(t[5]))[0] == alpha[5]


@every_schedule
def test_time_from_log_snr_is_the_inverse(name: str) -> None:
    schedule = SCHEDULES[name]
    # The last interval of a table that ends at alpha = 0 is infinitely long in log SNR.
    t = np.linspace(0.01, 0.99 if name != "table" else 0.75, 100) * top(schedule)
    np.testing.assert_allclose(schedule.t_of_log_snr(schedule.log_snr(t)), t, rtol=1e-9)
    alpha, sigma = schedule.alpha_sigma(t)
    np.testing.assert_allclose(schedule.log_snr(t), np.log(alpha**2 / sigma**2), rtol=1e-9, atol=1e-9)


@every_schedule
def test_both_ends_of_log_snr_have_a_time(name: str) -> None:
    """Nothing but signal and nothing but noise; what a schedule has not got is held to its own last time."""
    schedule = SCHEDULES[name]
    np.testing.assert_allclose(schedule.t_of_log_snr([np.inf, -np.inf]), [0, top(schedule)], atol=1e-12)
    np.testing.assert_allclose(schedule.t_of_angle([0, np.pi / 2]), [0, top(schedule)], atol=1e-12)


def test_values_at_known_points() -> None:
    linear = SCHEDULES["linear"]
    assert linear.alphas_cumprod is not None
    assert linear.alphas_cumprod[0] == pytest.approx(1 - 1e-4, abs=1e-15)
    assert linear.alphas_cumprod[-1] == pytest.approx(4.0358e-5, rel=1e-4)  # the familiar sigma/alpha of 157.4
    alpha, sigma = SCHEDULES["continuous_cosine"].alpha_sigma([0.0, 1 / 3, 1.0])
    np.testing.assert_allclose(alpha, [1, 3**0.5 / 2, 0], rtol=0, atol=1e-15)
    assert sigma[0] == 0
    assert alpha[2] == 0
    alpha, sigma = SCHEDULES["vp_sde"].alpha_sigma([0.0, 1.0])
    np.testing.assert_allclose(alpha, [1, np.exp(-5.025)], rtol=1e-12)
    assert sigma[0] == 0


def test_tables_equal_the_published_ones() -> None:
    diffusers = pytest.importorskip("diffusers")
    names = {"linear": "linear", "scaled_linear": "scaled_linear", "cosine": "squaredcos_cap_v2"}
    for ours, theirs in names.items():
        betas = (0.00085, 0.012) if ours == "scaled_linear" else (1e-4, 0.02)
        peer = diffusers.DDPMScheduler(beta_schedule=theirs, beta_start=betas[0], beta_end=betas[1])
        table = SCHEDULES[ours].alphas_cumprod
        np.testing.assert_allclose(np.asarray(table), peer.alphas_cumprod.double().numpy(), rtol=3e-4)


def test_network_time() -> None:
    assert Schedule.linear().network_time([999, 0]).tolist() == [999, 0]
    assert Schedule.linear(n=500, conditioning="t1000").network_time([499, 0]).tolist() == [998, 0]
    assert Schedule.vp_sde().network_time([1.0, 0.25]).tolist() == [1000, 250]
    sr3 = SCHEDULES["linear_sr3"]
    assert sr3.alphas_cumprod is not None
    padded = np.sqrt(np.append(1.0, sr3.alphas_cumprod))  # SR3's own table; step t reads entry t + 1
    np.testing.assert_array_equal(sr3.network_time([0, 1234, 1999]), padded[[1, 1235, 2000]])


def test_schedules_of_the_presets() -> None:
    assert Schedule.from_config(PRESETS["idm-128"].diffusion).network_time(1.0) == 1000
    sr3 = Schedule.from_config(PRESETS["sr3-128"].diffusion)
    assert (sr3.size, sr3.conditioning) == (2000, "noise_level")
    assert Schedule.from_config(DiffusionConfig("cosine", train_steps=100)).size == 100


def test_training_times_cover_the_schedule() -> None:
    assert Schedule.linear(n=10).t_of_uniform([0.0, 0.55, 0.9999999]).tolist() == [0, 5, 9]
    t = Schedule.continuous_cosine(t_max=0.5).t_of_uniform([0.0, 0.5])
    assert t.tolist() == [1e-5, 0.25]


# ---- spacings --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spacing", ["trailing", "leading", "linspace"])
@pytest.mark.parametrize("steps", [2, 3, 7, 30, 50, 250, 999, 1000])
def test_timesteps_equal_diffusers(spacing: Any, steps: int) -> None:
    diffusers = pytest.importorskip("diffusers")
    peer = diffusers.DDIMScheduler(timestep_spacing=spacing)
    peer.set_timesteps(steps)
    theirs = peer.timesteps.numpy()[:steps]  # its arange can run one step too far
    assert Schedule.linear().timesteps(steps, spacing).tolist() == theirs.tolist()


@pytest.mark.parametrize("steps", [1, 2, 4, 9, 39])
@pytest.mark.parametrize("start", [1.0, 0.5, 0.04])
@pytest.mark.parametrize("spacing", [each for each in SPACINGS if each != "angle"])
def test_timesteps_fall_strictly_and_keep_to_the_start(spacing: Any, start: float, steps: int) -> None:
    if spacing == "leading":
        steps += 1  # it needs two
    t = Schedule.linear().timesteps(steps, spacing, start)
    assert len(t) == steps
    assert np.all(np.diff(t) < 0)
    assert t[-1] >= 0
    assert t[0] <= 1000 * start - 1
    if spacing != "leading":
        assert t[0] == 1000 * start - 1
        t = Schedule.vp_sde().timesteps(steps, spacing, start)
        assert t[0] == start
        assert np.all(np.diff(t) < 0)
        assert t[-1] > 0


@pytest.mark.parametrize("start", [1.0, 0.6])
def test_equal_angles_are_equal_times_of_the_cosine(start: float) -> None:
    cosine, sde = Schedule.continuous_cosine(), Schedule.vp_sde()
    np.testing.assert_allclose(cosine.timesteps(7, "angle", start), cosine.timesteps(7, "uniform", start), atol=1e-12)
    times = sde.timesteps(5, "angle", start)
    angles = np.arctan2(*reversed(sde.alpha_sigma(times)))
    assert times[0] == start
    np.testing.assert_allclose(angles, angles[0] * np.arange(5, 0, -1) / 5, rtol=1e-9)


def test_the_linear_vp_sde_is_the_integral_of_its_beta() -> None:
    """alpha = exp(-1/2 int beta) and sigma^2 = 1 - alpha^2, by quadrature of beta(t) = 0.1 + 19.9 t."""
    for t in (1e-5, 0.01, 0.3, 1.0):
        nodes, weights = np.polynomial.legendre.leggauss(8)
        integral = (0.1 + 19.9 * t * (nodes + 1) / 2) @ weights * t / 2
        alpha, sigma = Schedule.from_config(PRESETS["clr-prior-128"].diffusion).alpha_sigma(t)
        assert alpha == pytest.approx(np.exp(-integral / 2), rel=1e-13)
        assert sigma == pytest.approx(np.sqrt(-np.expm1(-integral)), rel=1e-13)


def test_respaced_chains() -> None:
    assert respace(1000, "ddim250").tolist() == list(range(0, 1000, 4))  # DifFace
    assert respace(1000, "ddim250").tolist()[::-1] == Schedule.linear().timesteps(250, "leading").tolist()
    assert respace(300, [10, 15, 20])[[0, 9, 10, 24, 25, 44]].tolist() == [0, 99, 100, 199, 200, 299]
    assert respace(10, "5").tolist() == [0, 2, 4, 7, 9]
    assert respace(11, "1,2").tolist() == [0, 6, 10]  # the first section takes the odd one


# ---- parameterisations -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("parameterisation", PARAMETERISATIONS)
def test_x0_comes_back_from_the_target(parameterisation: Any) -> None:
    generator = torch.Generator().manual_seed(1)
    x0, eps = torch.randn(2, 4, 3, 5, 5, dtype=torch.float64, generator=generator)
    levels = Schedule.cosine().alpha_sigma([0, 10, 500, 990])
    alpha, sigma = (torch.from_numpy(level)[:, None, None, None] for level in levels)
    x = alpha * x0 + sigma * eps
    out = target(parameterisation, x0, eps, alpha, sigma)
    torch.testing.assert_close(x0_from_output(parameterisation, x, out, alpha, sigma), x0)
    torch.testing.assert_close(eps_from_x0(x, x0, alpha, sigma), eps)
    k_x, k_out = x0_coefficients(parameterisation, *levels)
    for i in range(4):
        torch.testing.assert_close(k_x[i] * x[i] + k_out[i] * out[i], x0[i])


# ---- errors ----------------------------------------------------------------------------------------------------

ANY_SCHEDULE: Any = Schedule
any_x0_coefficients: Any = x0_coefficients


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ANY_SCHEDULE.linear().timesteps(0), "steps must be an integer >= 1, got 0"),
        (lambda: ANY_SCHEDULE.linear().timesteps(2.0), "steps must be an integer >= 1, got 2.0"),
        (lambda: ANY_SCHEDULE.linear().timesteps(1001), "steps must be at most the schedule's 1000, got 1001"),
        (lambda: ANY_SCHEDULE.linear().timesteps(101, start=0.1), r"at most the schedule's 100 \(start 0.1 of 1000\)"),
        (lambda: ANY_SCHEDULE.linear().timesteps(5, "karras"), "spacing must be one of .*, got 'karras'"),
        (lambda: ANY_SCHEDULE.linear().timesteps(1, "leading"), "leading' needs at least 2 steps"),
        (lambda: ANY_SCHEDULE.vp_sde().timesteps(5, "leading"), "spacing of a continuous schedule must be"),
        (lambda: ANY_SCHEDULE.linear().timesteps(5, "angle"), "spacing of a table must be .*, got angle"),
        (lambda: ANY_SCHEDULE.vp_sde().timesteps(5, "angle", 0.0), r"start must be inside \(0, 1\], got 0.0"),
        (lambda: ANY_SCHEDULE.linear().timesteps(5, start=0.0), r"start must be inside \(0, 1\], got 0.0"),
        (lambda: ANY_SCHEDULE.linear().timesteps(5, start=float("nan")), r"start must be inside \(0, 1\], got nan"),
        (lambda: ANY_SCHEDULE.linear().alpha_sigma(1000), r"t must be inside \[0, 999\], got 1000"),
        (lambda: ANY_SCHEDULE.vp_sde().alpha_sigma([0.5, -0.1]), r"t must be inside \[0, 1\], got -0.1"),
        (lambda: ANY_SCHEDULE.linear(0.0, 0.02), r"betas must be inside \(0, 1\), got 0 .. 0.02"),
        (lambda: ANY_SCHEDULE.scaled_linear(-1.0, 0.02), r"betas must be inside \(0, 1\)"),
        (lambda: ANY_SCHEDULE.cosine(0), "n must be an integer >= 1, got 0"),
        (lambda: ANY_SCHEDULE.vp_sde(2.0, 1.0), "0 < beta_min <= beta_max, got 2.0, 1.0"),
        (lambda: ANY_SCHEDULE.continuous_cosine(t_max=1.5), r"t_max must be inside \(0, 1\], got 1.5"),
        (lambda: ANY_SCHEDULE.continuous_cosine(conditioning="index"), "'index' needs a table"),
        (lambda: ANY_SCHEDULE.from_alphas_cumprod([0.5, 0.6]), "alphas_cumprod must fall strictly"),
        (lambda: ANY_SCHEDULE.from_alphas_cumprod([float("nan")]), "alphas_cumprod must fall strictly"),
        (lambda: ANY_SCHEDULE.from_alphas_cumprod([[0.5]]), "alphas_cumprod must be a list"),
        (lambda: ANY_SCHEDULE.linear(conditioning="time"), "conditioning must be one of .* got 'time'"),
        (lambda: respace(1000, "ddim251"), "ddim steps must divide 1000 by a whole stride, got 251"),
        (lambda: respace(1000, "many"), "must look like 'ddim250' or '10,20,30', got 'many'"),
        (lambda: respace(10, [6, 1]), "section 0 must keep at most its 5 steps, got 6"),
        (lambda: respace(10, [0]), r"counts >= 1, got \[0\]"),
        (lambda: any_x0_coefficients("score", np.ones(1), np.ones(1)), "must be one of eps, v, x0, got 'score'"),
        (lambda: any_x0_coefficients("eps", np.zeros(1), np.ones(1)), "eps needs alpha >= 1e-06 at every step, got 0"),
    ],
)
def test_wrong_arguments_are_named(call: Callable[[], object], message: str) -> None:
    with pytest.raises(IdmFastError, match=message):
        call()
