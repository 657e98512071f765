"""How much of each restored face is taken: all, a part, or nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from idm_fast.clean.measure import Identity, low_frequency
from idm_fast.clean.options import CleanOptions

SHARES = (1.0, 0.75, 0.5, 0.25)  # of the restored face, tried in this order; after them the original is kept


@dataclass
class Verdict:
    """``share`` of the restored face that is taken, 0 = rejected; recognition distance (None: not measured) and
    low-frequency difference of the whole restored face to its original, and of what is taken."""

    share: float
    restored_distance: float | None
    restored_low_frequency: float
    distance: float | None
    low_frequency: float


def judge(
    before: Sequence[Tensor], after: Sequence[Tensor], options: CleanOptions, identity: Identity | None
) -> list[Verdict]:
    """The largest share of each face that is within the bounds of ``options``.

    ``before``, ``after``: original and restored face, [3, S, S] in [-1, 1] each. What is taken is
    ``before + share (after - before)``, whose low-frequency difference is ``share`` times the whole one's; its
    recognition distance is measured, all faces of a share together.
    """
    if not before:
        return []
    low = [low_frequency(*pair) for pair in zip(before, after, strict=True)]
    verdicts = [Verdict(0.0, None, value, None, 0.0) for value in low]
    waiting = list(range(len(before)))
    own = identity.embed([*before, *after]) if identity is not None else None
    most = options.max_identity_distance
    for share in SHARES:
        fit = [n for n in waiting if options.max_low_frequency is None or share * low[n] <= options.max_low_frequency]
        apart: dict[int, float | None] = dict.fromkeys(waiting)
        if identity is not None and own is not None:
            if share == 1.0:  # measured for all, since the report tells of it
                seen, measured = own[len(before) :], waiting
            else:
                mixed = [torch.lerp(before[n], after[n], share) for n in fit]
                seen, measured = identity.embed(mixed) if mixed else own[:0], fit
            distances = torch.linalg.vector_norm(seen - own[measured], dim=1).tolist()
            apart |= dict(zip(measured, distances, strict=True))
        for n in waiting if share == 1.0 else fit:
            value = apart[n]
            if share == 1.0:
                verdicts[n].restored_distance = value
            if n in fit and (most is None or value is None or value <= most):
                verdicts[n].share, verdicts[n].distance, verdicts[n].low_frequency = share, value, share * low[n]
        waiting = [n for n in waiting if verdicts[n].share == 0.0]
    for n in waiting:  # what is kept is the original itself
        verdicts[n].distance = None if identity is None else 0.0
    return verdicts
