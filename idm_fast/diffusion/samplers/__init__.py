"""Solvers: each turns a walk of noise levels into rows of coefficients. Nothing here knows a network or a device."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from idm_fast.diffusion import parameterisation as _parameterisation
from idm_fast.diffusion.parameterisation import Parameterisation
from idm_fast.diffusion.samplers.ddim import ddim
from idm_fast.diffusion.samplers.ddpm import VARIANCES, Variance, ddpm
from idm_fast.diffusion.samplers.dpmpp_2m import dpmpp_2m
from idm_fast.diffusion.samplers.dpmpp_2m_sde import dpmpp_2m_sde
from idm_fast.diffusion.samplers.euler import euler
from idm_fast.diffusion.samplers.euler_maruyama import euler_maruyama
from idm_fast.diffusion.samplers.heun import heun
from idm_fast.diffusion.samplers.langevin import corrected
from idm_fast.diffusion.samplers.pf_ode import pf_ode
from idm_fast.diffusion.schedule import Schedule, Times
from idm_fast.diffusion.spacing import Spacing
from idm_fast.diffusion.table import COLUMNS, Array, Row, SamplerTable
from idm_fast.errors import IdmFastError


class Solver(NamedTuple):
    """``rows(alpha [S+1], sigma [S+1], eta)`` and its eta: the default, and whether another one may be asked for.

    ``remembers``: a row may read the x0_hat before it, so no corrector's may come between.
    """

    rows: Callable[[Array, Array, float], list[Row]]
    eta: float
    takes_eta: bool
    remembers: bool = False


SOLVERS: dict[str, Solver] = {
    "ddpm": Solver(ddpm, 1.0, False),
    "ddim": Solver(ddim, 0.0, True),
    "euler": Solver(euler, 0.0, False),
    "heun": Solver(heun, 0.0, False, remembers=True),
    "dpmpp_2m": Solver(dpmpp_2m, 0.0, False, remembers=True),
    "dpmpp_2m_sde": Solver(dpmpp_2m_sde, 1.0, True, remembers=True),
    "euler_maruyama": Solver(euler_maruyama, 1.0, True),
    "pf_ode": Solver(pf_ode, 0.0, False),
}
CORRECTOR_SNR = 0.16  # of the score SDE's published settings


def build_table(
    schedule: Schedule,
    parameterisation: Parameterisation,
    solver: str = "ddim",
    steps: int | None = None,
    *,
    spacing: Spacing = "trailing",
    start: float = 1.0,
    eta: float | None = None,
    clamp: float | None = None,
    timesteps: Times | None = None,
    noise_timestep: float | None = None,
    variance: Variance = "small",
    corrector_steps: int = 0,
    corrector_snr: float = CORRECTOR_SNR,
) -> SamplerTable:
    """The table of a run: ``steps`` steps of ``solver`` from the noise level at ``start`` down to the clean image.

    - ``steps, spacing, start``: as ``Schedule.timesteps``; or give the falling ``timesteps`` themselves.
    - ``eta``: None = the solver's own (ddim 0, dpmpp_2m_sde and euler_maruyama 1); else inside [0, 1] for those.
    - ``clamp``: x0_hat is held to [-clamp, clamp] at every evaluation; None = not. Images: 1.
    - ``noise_timestep``: the time whose noise level the walk's x has, where that is not the first timestep. DifFace
      noises to chain index 100 but walks 99 .. 0.
    - ``variance``: of ddpm's steps (other solvers have none): "small", "large" or "learned"; the last needs a network
      with a second half of output channels (see ``samplers/ddpm.py``).
    - ``corrector_steps``: Langevin steps at each noise level between the first and the clean image, one evaluation
      each, of the strength ``corrector_snr`` (see ``samplers/langevin.py``); of solvers that do not remember.

    Errors: ``IdmFastError`` naming the argument, the expected and the actual value.
    """
    if solver not in SOLVERS:
        raise IdmFastError(f"sampler: solver must be one of {', '.join(SOLVERS)}, got {solver!r}")
    eta = _eta(solver, eta)
    if clamp is not None and not 0 < clamp < np.inf:
        raise IdmFastError(f"sampler: clamp must be a finite number > 0 or None, got {clamp!r}")
    if variance not in VARIANCES:
        raise IdmFastError(f"sampler: variance must be one of {', '.join(VARIANCES)}, got {variance!r}")
    walk = _walk(schedule, steps, spacing, start, timesteps)
    begin = schedule.alpha_sigma(walk[0] if noise_timestep is None else noise_timestep)

    alpha, sigma = (np.append(part, end) for part, end in zip(schedule.alpha_sigma(walk), (1.0, 0.0), strict=True))
    rows_of = VARIANCES[variance] if solver == "ddpm" else SOLVERS[solver].rows
    steps_taken = rows_of(alpha, sigma, eta)
    learned = solver == "ddpm" and variance == "learned"
    if _corrects(solver, learned, corrector_steps, corrector_snr):
        steps_taken = corrected(steps_taken, alpha, sigma, corrector_steps, corrector_snr)
    nodes = np.array([row.node for row in steps_taken])
    rows = np.zeros((len(steps_taken), len(COLUMNS)))
    rows[:, 0], rows[:, 1] = _parameterisation.x0_coefficients(parameterisation, alpha[nodes], sigma[nodes])
    rows[:, 2:6] = np.array([row[1:5] for row in steps_taken]) + 0.0  # makes -0 plain 0, which kernels test for
    rows[:, 6] = clamp or 0.0
    rows[:, 7] = [row.spread for row in steps_taken]
    return SamplerTable(
        rows=rows,
        network_time=schedule.network_time(walk)[nodes],
        timesteps=walk,
        alpha=alpha[nodes],
        sigma=sigma[nodes],
        alpha_start=float(begin[0]),
        sigma_start=float(begin[1]),
        solver=solver,
        steps=len(walk),
        eta=eta,
        parameterisation=parameterisation,
        learned_variance=learned,
    )


def _eta(solver: str, eta: float | None) -> float:
    known = SOLVERS[solver]
    if eta is None or eta == known.eta:
        return known.eta
    if not 0 <= eta <= 1:
        raise IdmFastError(f"sampler: eta must be inside [0, 1], got {eta!r}")
    if not known.takes_eta:
        takers = ", ".join(name for name, entry in SOLVERS.items() if entry.takes_eta)
        raise IdmFastError(f"sampler: eta of {solver} must be {known.eta:g} (only {takers} take another), got {eta:g}")
    return float(eta)


def _corrects(solver: str, learned: bool, steps: int, snr: float) -> bool:
    """Whether there is a corrector; raises ``IdmFastError`` for one that makes no sense."""
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 0:
        raise IdmFastError(f"sampler: corrector_steps must be a whole number >= 0, got {steps!r}")
    if not 0 < snr < 0.5:  # beyond, a step turns x round: its weight 1 - 2 snr^2 is below 1/2
        raise IdmFastError(f"sampler: corrector_snr must lie in (0, 0.5), got {snr!r}")
    if steps and (learned or SOLVERS[solver].remembers):
        what = f"{solver} with a learned variance" if learned else solver
        able = ", ".join(name for name, entry in SOLVERS.items() if not entry.remembers)
        raise IdmFastError(f"sampler: corrector_steps of {what} must be 0 (it needs one of {able}), got {steps}")
    return steps > 0


def _walk(schedule: Schedule, steps: int | None, spacing: Spacing, start: float, timesteps: Times | None) -> Array:
    if (steps is None) == (timesteps is None):
        raise IdmFastError(f"sampler: exactly one of steps and timesteps must be given, got {steps!r}, {timesteps!r}")
    if timesteps is None:
        assert steps is not None  # the test above, in words that a type checker follows
        return schedule.timesteps(steps, spacing, start)
    walk = np.array(timesteps, dtype=np.float64)
    if walk.ndim != 1 or walk.size < 1 or bool(np.any(np.diff(walk) >= 0)):
        raise IdmFastError(f"sampler: timesteps must be a falling list of at least one time, got {timesteps!r}")
    if not bool(np.all(schedule.alpha_sigma(walk)[1] > 0)):
        raise IdmFastError(f"sampler: timesteps must have sigma > 0 at every step, got {walk[-1]:g} as the last")
    return walk


__all__ = ["CORRECTOR_SNR", "SOLVERS", "VARIANCES", "Solver", "Variance", "build_table"]
