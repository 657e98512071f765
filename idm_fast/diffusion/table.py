"""A whole sampling run as numbers: one row of coefficients per network evaluation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Array = npt.NDArray[np.float64]
COLUMNS = ("k_x", "k_out", "a", "b", "c", "s", "clamp", "spread")


class Row(NamedTuple):
    """x_next = a x + b x0_hat + c x0_hat_prev + s noise, with the network evaluated at node ``node`` of the walk.

    ``c`` = 0 means that x0_hat_prev is not read (at the first evaluation it does not exist).

    In a table of ``learned_variance`` the history that ``c`` weighs is not x0_hat_prev but exp(spread v) noise, with v
    the network's second half: a standard deviation of its own for every element.
    """

    node: int
    a: float
    b: float
    c: float = 0.0
    s: float = 0.0
    spread: float = 0.0


@dataclass(frozen=True, eq=False)
class SamplerTable:
    """What ``sample`` needs, for E network evaluations; build it with ``idm_fast.diffusion.build_table``.

    Arrays are float64 and read-only. Columns of ``rows`` are ``COLUMNS``: x0_hat = k_x x + k_out out, clamped to
    [-clamp, clamp] where clamp > 0, then the update of ``Row``. The fused update does not read ``spread``: who walks a
    table of ``learned_variance`` fills the history with exp(spread v) noise before each update.
    """

    rows: Array  # [E, 8]
    network_time: Array  # [E], what the network is told
    timesteps: Array  # [steps], the schedule's time at each step
    alpha: Array  # [E], at each evaluation
    sigma: Array  # [E]
    alpha_start: float  # the noise level of the x that the walk begins with
    sigma_start: float
    solver: str
    steps: int
    eta: float
    parameterisation: str
    learned_variance: bool = False

    def __post_init__(self) -> None:
        for array in (self.rows, self.network_time, self.timesteps, self.alpha, self.sigma):
            array.setflags(write=False)

    @property
    def evaluations(self) -> int:
        """E: how often the network runs (Heun: twice a step, once in the last)."""
        return len(self.rows)

    @property
    def stochastic(self) -> bool:
        """Whether any step draws noise."""
        drawn = COLUMNS.index("c" if self.learned_variance else "s")
        return bool(np.any(self.rows[:, drawn] != 0))

    def float32(self, device: torch.device | str = "cpu") -> Tensor:
        """``rows`` as the float32 [E, 8] tensor that ``idm_fast.kernels.sampler_update`` reads."""
        return torch.from_numpy(self.rows.astype(np.float32)).to(device)

    def times(self, batch: int, device: torch.device | str = "cpu") -> Tensor:
        """``network_time`` as float32 [E, batch]: row e is the network's ``t`` of evaluation e."""
        column = torch.from_numpy(self.network_time.astype(np.float32)).to(device)
        return column[:, None].expand(-1, batch).contiguous()
