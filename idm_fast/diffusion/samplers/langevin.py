"""The Langevin corrector of predictor-corrector sampling (2011.13456, algorithms 3 and 5)."""

from __future__ import annotations

from idm_fast.diffusion.table import Array, Row


def corrected(rows: list[Row], alpha: Array, sigma: Array, steps: int, snr: float) -> list[Row]:
    """``rows`` with ``steps`` Langevin steps at each noise level that they reach, but for the last, which is clean.

    alpha, sigma: [S + 1] falling noise levels; ``rows``: one a level, each leading to the next. A corrector step is

        x <- x + epsilon score + sqrt(2 epsilon) noise,   epsilon = 2 (snr |noise| / |score|)^2

    and moves x at one level towards that level's distribution; ``snr`` r is the ratio that the paper calls
    signal-to-noise. The paper takes both norms from the batch at hand. Here they are the expected ones, so that nothing
    is measured in the walk and a batch equals its singles: of D values E|noise|^2 = D, and E|score|^2 = D / sigma^2
    where x0_hat is right, since the score then is -noise / sigma. So epsilon = 2 r^2 sigma^2, and a row of the table

        x <- (1 - 2 r^2) x + 2 r^2 alpha x0_hat + 2 r sigma noise

    whatever the network says. (Algorithm 5 also multiplies epsilon by 1 - beta_i of its 1000 levels, at least 0.98.)
    At a score that is exact for variance v the walk settles at v / (1 - epsilon / (2 v)), a bias that falls as r^2.
    """
    weight = 2 * snr**2
    found = rows[:1]
    for row in rows[1:]:
        level = row.node
        step = Row(level, 1 - weight, weight * alpha[level], s=2 * snr * sigma[level])
        found += [step] * steps + [row]
    return found
