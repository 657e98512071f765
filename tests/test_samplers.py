"""Solvers against a closed form, against diffusers and SR3 step by step; their tables and errors."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from gaussian_target import DEVIATION, MEAN, gaussian_moments, posterior_mean, variance
from torch import Tensor

from idm_fast.diffusion import (
    PARAMETERISATIONS,
    SOLVERS,
    SamplerTable,
    Schedule,
    build_table,
    initial_noise,
    respace,
    sample,
)
from idm_fast.diffusion.parameterisation import eps_from_x0, target
from idm_fast.errors import IdmFastError
from idm_fast.kernels import philox_normal

COSINE = Schedule.continuous_cosine()
LINEAR = Schedule.linear()
SEEDS = torch.tensor([3, -1, 2**40 + 7])
SHAPE = (3, 3, 8, 8)
Array = npt.NDArray[np.float64]


def walk(
    table: SamplerTable,
    network: Callable[[Any, int], Any],
    x: Any,
    noise: Callable[[int], Any] | None = None,
) -> list[Any]:
    """The update of every row in the precision of ``x`` (float64): x after each evaluation."""
    history, path = None, []
    for e, (k_x, k_out, a, b, c, s, clamp, _) in enumerate(table.rows.tolist()):
        x0 = k_x * x + k_out * network(x, e)
        x0 = x0.clip(-clamp, clamp) if clamp else x0
        x = a * x + b * x0
        if c:
            x = x + c * history
        if s:
            assert noise is not None
            x = x + s * noise(e)
        history = x0
        path.append(x)
    return path


# ---- a Gaussian target, whose trajectory is known --------------------------------------------------------------


@pytest.mark.parametrize(
    ("solver", "order"), [("ddim", 1), ("euler", 1), ("heun", 2), ("dpmpp_2m", 2), ("dpmpp_2m_sde", 2)]
)
def test_error_falls_at_the_order_of_the_solver(solver: str, order: int) -> None:
    start, errors = np.linspace(-2, 2, 9), []
    for steps in (32, 64, 128):
        alpha, sigma = COSINE.alpha_sigma(np.linspace(0.9, 0.1, steps + 1))
        x, history = start, start
        for row in SOLVERS[solver].rows(alpha, sigma, 0.0):
            x0 = posterior_mean(x, alpha[row.node], sigma[row.node])
            x, history = row.a * x + row.b * x0 + row.c * history, x0
        level = variance(alpha, sigma)
        exact = alpha[-1] * MEAN + np.sqrt(level[-1] / level[0]) * (start - alpha[0] * MEAN)
        errors.append(np.abs(x - exact).max())
    orders = np.log2(np.array(errors[:-1]) / errors[1:])
    np.testing.assert_allclose(orders, order, atol=0.1)


@pytest.mark.parametrize(("solver", "bound"), [("ddim", 1.3e-2), ("euler", 1.3e-2), ("heun", 2e-4), ("dpmpp_2m", 2e-3)])
@pytest.mark.parametrize("start", [1.0, 0.5])
def test_a_whole_walk_ends_on_the_target(solver: str, bound: float, start: float) -> None:
    x = np.linspace(-2, 2, 9)
    table = build_table(COSINE, "x0", solver, 128, start=start)
    last = walk(table, lambda x, e: posterior_mean(x, table.alpha[e], table.sigma[e]), x)[-1]
    scale = DEVIATION / np.sqrt(variance(table.alpha_start, table.sigma_start))
    np.testing.assert_allclose(last, MEAN + scale * (x - table.alpha_start * MEAN), atol=bound)


STOCHASTIC = [("ddpm", None), ("ddim", 1.0), ("ddim", 0.5), ("dpmpp_2m_sde", None), ("dpmpp_2m_sde", 0.5)]


@pytest.mark.parametrize(("solver", "eta"), STOCHASTIC)
def test_stochastic_solvers_converge_to_the_target_distribution(solver: str, eta: float | None) -> None:
    errors = []
    for steps in (80, 160, 320):
        mean, var = gaussian_moments(build_table(COSINE, "x0", solver, steps, eta=eta))
        assert mean == pytest.approx(MEAN, abs=1e-9)
        errors.append(abs(var - DEVIATION**2))
    assert errors[-1] < 7e-3
    assert errors[0] / errors[1] > 1.7
    assert errors[1] / errors[2] > 1.7


@pytest.mark.parametrize(("solver", "eta"), STOCHASTIC)
def test_drawn_samples_have_the_predicted_moments(solver: str, eta: float | None) -> None:
    table = build_table(COSINE, "v", solver, 12, eta=eta)
    seeds = torch.arange(8)

    def denoise(x: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = (torch.tensor(float(level)) for level in COSINE.alpha_sigma(float(t[0]) / 1000))
        x0 = posterior_mean(x, alpha, sigma)
        return target("v", x0, eps_from_x0(x, x0, alpha, sigma), alpha, sigma)

    x = sample(denoise, table, initial_noise(seeds, (8, 3, 32, 32), "cpu"), seeds)
    mean, var = gaussian_moments(table)
    count = x.numel()
    assert float(x.mean()) == pytest.approx(mean, abs=4 * (var / count) ** 0.5)
    assert float(x.var()) == pytest.approx(var, abs=4 * var * (2 / count) ** 0.5)


# ---- diffusers, step by step -----------------------------------------------------------------------------------

PREDICTION = {"eps": "epsilon", "v": "v_prediction", "x0": "sample"}
numpy_copy = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # inside diffusers
TIMES = list(range(983, -1, -109))  # ten times down to 2; the last interval is not like the others


def smooth_network(x: Tensor, e: int) -> Tensor:
    return 0.4 * torch.sin(3 * x + e) + 0.3 * x


def noise(e: int) -> Tensor:
    return philox_normal(SEEDS, SHAPE, e, "cpu").double()


def peer_scheduler(name: str, **settings: Any) -> Any:
    diffusers = pytest.importorskip("diffusers")
    peer = getattr(diffusers, name)(**settings)
    assert LINEAR.alphas_cumprod is not None
    peer.alphas_cumprod = torch.from_numpy(LINEAR.alphas_cumprod.copy())  # theirs is the same in float32
    return peer


def compare(table: SamplerTable, step: Callable[[Tensor, int], Tensor], tolerance: float) -> None:
    """Each step from the same x; errors against the largest x or x0_hat, which eps at low SNR makes as big as 100."""
    x = initial_noise(SEEDS, SHAPE, "cpu").double()
    largest = 1.0
    for e, ours in enumerate(walk(table, smooth_network, x, noise)):
        x0 = table.rows[e, 0] * x + table.rows[e, 1] * smooth_network(x, e)
        largest = max(largest, float(x0.abs().max()))
        theirs = step(x, e)
        assert float((ours - theirs).abs().max()) <= tolerance * largest, f"evaluation {e}"
        x = ours


@pytest.mark.parametrize("clamp", [None, 1.0])
@pytest.mark.parametrize("parameterisation", PARAMETERISATIONS)
def test_ddpm_equals_diffusers(parameterisation: Any, clamp: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {"prediction_type": PREDICTION[parameterisation], "clip_sample": clamp is not None}
    peer = peer_scheduler("DDPMScheduler", **settings)
    peer.set_timesteps(timesteps=TIMES)
    counter = itertools.count()
    module = "diffusers.schedulers.scheduling_ddpm.randn_tensor"
    monkeypatch.setattr(module, lambda *_, **__: noise(next(counter)))
    table = build_table(LINEAR, parameterisation, "ddpm", timesteps=TIMES, clamp=clamp)
    # Theirs adds noise of variance 1e-20 in the last step, whose variance is 0.
    compare(table, lambda x, e: peer.step(smooth_network(x, e), TIMES[e], x).prev_sample, 1e-9)


@pytest.mark.parametrize("clamp", [None, 1.0])
@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("parameterisation", PARAMETERISATIONS)
def test_ddim_equals_diffusers(parameterisation: Any, eta: float, clamp: float | None) -> None:
    # Theirs takes eps from the unclamped x0_hat unless told; ours always from the clamped one, as guided-diffusion.
    settings = {"prediction_type": PREDICTION[parameterisation], "clip_sample": clamp is not None}
    peer = peer_scheduler("DDIMScheduler", **settings)
    peer.set_timesteps(20)
    times = peer.timesteps.tolist()

    def step(x: Tensor, e: int) -> Tensor:
        out: Tensor = peer.step(
            smooth_network(x, e), times[e], x, eta, use_clipped_model_output=True, variance_noise=noise(e)
        ).prev_sample
        return out

    compare(build_table(LINEAR, parameterisation, "ddim", 20, spacing="leading", eta=eta, clamp=clamp), step, 1e-11)


@numpy_copy
@pytest.mark.parametrize("parameterisation", PARAMETERISATIONS)
@pytest.mark.parametrize(
    ("solver", "name", "tolerance"),
    # Their Euler computes in float32, in z = x/alpha of a size up to 157; so does the comparison in x.
    [("euler", "EulerDiscreteScheduler", 1e-6), ("heun", "HeunDiscreteScheduler", 1e-11)],
)
def test_euler_and_heun_equal_diffusers(solver: str, name: str, tolerance: float, parameterisation: Any) -> None:
    table = build_table(LINEAR, parameterisation, solver, timesteps=TIMES)
    peer = peer_scheduler(name, prediction_type=PREDICTION[parameterisation])
    peer.set_timesteps(timesteps=TIMES)
    alpha, sigma = LINEAR.alpha_sigma(TIMES)
    k = np.append(sigma / alpha, 0.0)
    doubled = k if solver == "euler" else np.concatenate([k[:1], np.repeat(k[1:-1], 2), k[-1:]])
    np.testing.assert_allclose(peer.sigmas.numpy(), doubled, rtol=1e-6)
    peer.sigmas = torch.from_numpy(doubled)  # theirs is the same in float32
    # They keep z = x sqrt(1 + k^2) and begin it at k_max (or sqrt(1 + k_max^2) with leading spacing) times the noise.
    scale = np.sqrt(1 + doubled**2)
    assert len(peer.timesteps) == table.evaluations

    def step(x: Tensor, e: int) -> Tensor:
        z, t = x * scale[e], peer.timesteps[e]
        peer.scale_model_input(z, t)
        out: Tensor = peer.step(smooth_network(x, e), t, z).prev_sample / scale[e + 1]
        return out

    compare(table, step, tolerance)


@numpy_copy
@pytest.mark.parametrize("steps", [10, 20])  # they lower the order at the end below 15 steps, and always with sigma 0
@pytest.mark.parametrize("parameterisation", PARAMETERISATIONS)
@pytest.mark.parametrize(("solver", "algorithm"), [("dpmpp_2m", "dpmsolver++"), ("dpmpp_2m_sde", "sde-dpmsolver++")])
def test_dpmpp_equals_diffusers(solver: str, algorithm: str, parameterisation: Any, steps: int) -> None:
    times = LINEAR.timesteps(steps).astype(int).tolist()
    settings = {"prediction_type": PREDICTION[parameterisation], "algorithm_type": algorithm}
    peer = peer_scheduler("DPMSolverMultistepScheduler", final_sigmas_type="zero", solver_type="midpoint", **settings)
    peer.set_timesteps(timesteps=times)
    alpha, sigma = LINEAR.alpha_sigma(times)
    peer.sigmas = torch.from_numpy(np.append(sigma / alpha, 0.0))

    def step(x: Tensor, e: int) -> Tensor:
        out: Tensor = peer.step(smooth_network(x, e), times[e], x, variance_noise=noise(e)).prev_sample.double()
        return out

    compare(build_table(LINEAR, parameterisation, solver, timesteps=times), step, 1e-6)  # they step in float32


def test_sr3_posterior_equals_its_own_code() -> None:
    folder = Path(__file__).resolve().parents[2] / "shared" / "data" / "checkpoints" / "sr3_small"
    if not folder.is_dir():
        pytest.skip("needs ../shared/data/checkpoints/sr3_small")
    from safetensors.torch import load_file

    given = {name: value.double() for name, value in load_file(folder / "io.safetensors").items()}
    schedule = Schedule.linear(1e-6, 1e-2, 2000, conditioning="noise_level")
    table = build_table(schedule, "eps", "ddpm", 2000, clamp=1.0)
    e = 1999 - 1234
    assert table.network_time[e] == pytest.approx(float(given["noise_level"][0]), rel=1e-6)
    k_x, k_out, a, b, _, s, clamp, _ = table.rows[e].tolist()
    x0 = (k_x * given["x"] + k_out * given["eps"]).clamp(-clamp, clamp)
    torch.testing.assert_close(a * given["x"] + b * x0, given["posterior_mean"], rtol=1e-5, atol=1e-5)
    assert 2 * np.log(s) == pytest.approx(float(given["posterior_log_variance"]), rel=1e-6)


# ---- tables ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("schedule", [COSINE, LINEAR, Schedule.cosine(), Schedule.vp_sde()])
@pytest.mark.parametrize("steps", [1, 2, 5, 100])
def test_every_table_is_finite_and_ends_on_x0_hat(solver: str, schedule: Schedule, steps: int) -> None:
    table = build_table(schedule, "v", solver, steps, clamp=1.0)
    assert table.rows.shape == (table.evaluations, 8)
    assert table.float32().isfinite().all()
    assert table.rows[-1, 2:].tolist() == pytest.approx([0, 1, 0, 0, 1, 0], abs=1e-12)
    assert not np.signbit(table.rows[:, 4][table.rows[:, 4] == 0]).any()
    assert table.rows[0, 4] == 0  # the first evaluation has no history
    assert table.stochastic == (solver in ("ddpm", "dpmpp_2m_sde", "euler_maruyama") and steps > 1)
    corrected = steps - 1 - (solver == "heun" and table.sigma[0] > 1e3 * table.alpha[0] and steps > 1)
    assert table.evaluations == (steps + corrected if solver == "heun" else steps)
    with pytest.raises(ValueError, match="read-only"):
        table.rows[0, 0] = 1


def test_solvers_that_coincide() -> None:
    def rows(solver: str, eta: float | None = None) -> Array:
        return build_table(LINEAR, "eps", solver, 25, eta=eta).rows

    np.testing.assert_allclose(rows("ddim"), rows("euler"), rtol=1e-9)
    np.testing.assert_allclose(rows("ddim", 1.0), rows("ddpm"), rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(rows("dpmpp_2m_sde", 0.0), rows("dpmpp_2m"), rtol=1e-9, atol=1e-12)


def test_difface_chain_starts_in_the_middle() -> None:
    chain = respace(1000, "ddim250")
    table = build_table(LINEAR, "eps", "ddpm", timesteps=chain[:100][::-1], noise_timestep=chain[100])
    assert (table.evaluations, table.network_time[0], table.network_time[-1]) == (100, 396, 0)
    assert table.alpha_start == LINEAR.alpha_sigma(400)[0]


@pytest.mark.parametrize("solver", SOLVERS)
def test_eps_v_and_x0_networks_walk_alike(solver: str) -> None:
    ends = []
    for parameterisation in PARAMETERISATIONS:
        table = build_table(LINEAR, parameterisation, solver, 9, clamp=1.0)

        def network(x: Tensor, e: int, table: SamplerTable = table, name: Any = parameterisation) -> Tensor:
            alpha, sigma = torch.tensor(table.alpha[e]), torch.tensor(table.sigma[e])
            x0 = smooth_network(x, e)
            return target(name, x0, eps_from_x0(x, x0, alpha, sigma), alpha, sigma)

        ends.append(torch.stack(walk(table, network, noise(-1), noise)))
    torch.testing.assert_close(ends[0], ends[2], rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(ends[1], ends[2], rtol=1e-10, atol=1e-10)


# ---- errors ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"solver": "plms"}, "solver must be one of ddpm, ddim, euler, .*, got 'plms'"),
        ({"steps": 0}, "steps must be an integer >= 1, got 0"),
        ({"steps": 2000}, "steps must be at most the schedule's 1000, got 2000"),
        ({"eta": -0.1}, r"eta must be inside \[0, 1\], got -0.1"),
        ({"eta": float("nan")}, r"eta must be inside \[0, 1\], got nan"),
        (
            {"eta": 0.5, "solver": "heun"},
            r"eta of heun must be 0 \(only ddim, .*_sde, euler_maruyama take another\), got 0.5",
        ),
        ({"corrector_steps": -1}, "corrector_steps must be a whole number >= 0, got -1"),
        ({"corrector_steps": 1, "corrector_snr": 0.5}, r"corrector_snr must lie in \(0, 0.5\), got 0.5"),
        ({"corrector_steps": 1, "solver": "heun"}, r"corrector_steps of heun must be 0 \(it needs one of ddpm, ddim"),
        ({"corrector_steps": 2, "solver": "ddpm", "variance": "learned"}, "of ddpm with a learned variance must be 0"),
        ({"clamp": 0.0}, "clamp must be a finite number > 0 or None, got 0.0"),
        ({"parameterisation": "score"}, "parameterisation must be one of eps, v, x0, got 'score'"),
        ({"schedule": COSINE}, "eps needs alpha >= 1e-06 at every step, got 0"),
        ({"steps": None}, "exactly one of steps and timesteps must be given, got None, None"),
        ({"timesteps": [5, 1]}, "exactly one of steps and timesteps must be given"),
        ({"steps": None, "timesteps": [5, 5]}, "timesteps must be a falling list"),
        ({"steps": None, "timesteps": [1000, 5]}, r"t must be inside \[0, 999\]"),
        ({"steps": None, "schedule": Schedule.vp_sde(), "timesteps": [0.5, 0]}, r"must have sigma > 0 at every step"),
    ],
)
def test_wrong_settings_are_named(settings: dict[str, Any], message: str) -> None:
    good = {"schedule": LINEAR, "parameterisation": "eps", "solver": "ddim", "steps": 10}
    with pytest.raises(IdmFastError, match=message):
        build_table(**{**good, **settings})
