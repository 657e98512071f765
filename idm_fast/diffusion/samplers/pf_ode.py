"""Euler on the probability-flow ODE of the variance-preserving SDE (2011.13456, eq. 13)."""

from __future__ import annotations

from idm_fast.diffusion.samplers.euler_maruyama import euler_maruyama
from idm_fast.diffusion.table import Array, Row


def pf_ode(alpha: Array, sigma: Array, eta: float) -> list[Row]:
    """dx = -beta/2 (x + score) dt: ``euler_maruyama`` without its noise. First order.

    alpha, sigma: [S + 1] falling noise levels, the last one the end of the walk; eta is 0 by definition.
    ``euler`` and ``ddim`` solve the same equation in x / alpha, where its linear part is integrated exactly: they are
    the better choice for few steps.
    """
    return euler_maruyama(alpha, sigma, 0.0)
