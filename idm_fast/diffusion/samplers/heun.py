"""Heun's second-order method on the probability-flow ODE in EDM's variables (2206.00364, algorithm 1)."""

from __future__ import annotations

from idm_fast.diffusion.samplers.euler import euler_step
from idm_fast.diffusion.table import Array, Row

K_MAX = 1e3  # sigma/alpha from which a step is left uncorrected


def heun(alpha: Array, sigma: Array, eta: float) -> list[Row]:
    """Two evaluations a step: Euler to the next node, then the trapezoid with the slope found there.

    alpha, sigma: [S + 1] falling noise levels, the last one the end of the walk; eta is 0 by definition.
    With z = x/alpha, k = sigma/alpha, r = k'/k and x0_1, x0_2 the two estimates:

        Euler:      z~ = r z + (1 - r) x0_1
        trapezoid:  z' = z + (k' - k)/2 [(z - x0_1)/k + (z~ - x0_2)/k']

    z is not kept; putting z = (z~ - (1 - r) x0_1)/r from the first line into the second, all of it but

        z' = z~ + (1 - r)/(2 r) (x0_2 - x0_1)

    cancels, so the correction is one more row: a = 1, b = alpha' (k - k')/(2 k'), c = -b with x0_1 as the history.

    The step to sigma' = 0 is Euler alone (the slope there is 0/0), so S steps cost 2 S - 1 evaluations. A step that
    begins at k > 1e3 is Euler alone as well: the trapezoid weighs x0_2 - x0_1 by k/(2 k'), infinite at alpha = 0.
    """
    rows = []
    for i in range(len(alpha) - 1):
        rows.append(euler_step(alpha, sigma, i))
        if sigma[i + 1] == 0 or sigma[i] > K_MAX * alpha[i]:
            continue
        k, k_next = sigma[i] / alpha[i], sigma[i + 1] / alpha[i + 1]
        b = alpha[i + 1] * (k - k_next) / (2 * k_next)
        rows.append(Row(i + 1, 1.0, b, c=-b))
    return rows
