"""Euler on the probability-flow ODE in EDM's variables (2206.00364, eq. 1 and algorithm 1 without correction)."""

from __future__ import annotations

from idm_fast.diffusion.table import Array, Row


def euler_step(alpha: Array, sigma: Array, i: int) -> Row:
    """z = x/alpha, k = sigma/alpha; dz/dk = (z - x0_hat)/k, so z' = (k'/k) z + (1 - k'/k) x0_hat. In x:

        x' = sigma'/sigma x + (alpha' - alpha sigma'/sigma) x0_hat

    which needs no division by alpha, so the walk may begin at alpha = 0.
    """
    a = sigma[i + 1] / sigma[i]
    return Row(i, a, alpha[i + 1] - alpha[i] * a)


def euler(alpha: Array, sigma: Array, eta: float) -> list[Row]:
    """First order; the same numbers as ``ddim`` with eta = 0, kept under the name by which people ask for it.

    alpha, sigma: [S + 1] falling noise levels, the last one the end of the walk; eta is 0 by definition.
    """
    return [euler_step(alpha, sigma, i) for i in range(len(alpha) - 1)]
