"""How one subject differs from another on the same faces: known far better than the difference of their means."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from idm_fast.errors import IdmFastError
from idm_fast.evaluation.metrics import Estimate, FaceMetrics, Indices, bootstrap_mean, frechet_distance, jackknife


class Walking(Protocol):
    """What a comparison has to know of a subject."""

    @property
    def name(self) -> str: ...
    @property
    def steps(self) -> int | None: ...
    @property
    def sampler(self) -> str | None: ...


Subject = TypeVar("Subject", bound=Walking)


def changes(
    now: Mapping[str, Tensor], before: Mapping[str, Tensor], clean: Mapping[str, Tensor], seed: int
) -> dict[str, Estimate]:
    """The mean change from ``before`` to ``now``, by metric, with its 95 % interval.

    Values [N] of the same faces in the same order: the bootstrapped mean of the differences, over the faces that have
    a value in both. Features [N, D] of the set metrics, beside ``clean``'s: the distance's change in percent, by
    jackknife.
    """
    found = {}
    for key in (key for key in now if key in before):
        ours, theirs = now[key].double(), before[key].double()
        if key in FaceMetrics.DISTRIBUTION:
            found[key] = _distance_change(ours, theirs, clean[key].double(), seed)
            continue
        apart = ours - theirs
        apart = apart[~torch.isnan(apart)]
        found[key] = bootstrap_mean(apart, seed) if len(apart) else _NOTHING
    return found


def compared(subjects: Sequence[Subject], name: str) -> list[tuple[int, int]]:
    """(subject, what it is compared with) for the subjects that are not called ``name``, as positions.

    Of several that are called so, each is for the subjects of its own steps and sampler. Raises ``IdmFastError`` where
    none is called so, or none is left to compare.
    """
    bases = [i for i, subject in enumerate(subjects) if subject.name == name]
    if not bases:
        known = ", ".join(dict.fromkeys(repr(subject.name) for subject in subjects))
        raise IdmFastError(f"--against must be one of {known}, got {name!r}")
    pairs = []
    for i, subject in enumerate(subjects):
        if subject.name == name:
            continue
        alike = [b for b in bases if (subjects[b].steps, subjects[b].sampler) == (subject.steps, subject.sampler)]
        chosen = alike or bases
        if len(chosen) == 1:
            pairs.append((i, chosen[0]))
    if not pairs:
        raise IdmFastError(
            f"--against must be a row with others of its steps and sampler, got {name!r} = {len(bases)} rows with none"
        )
    return pairs


_NOTHING = Estimate(math.nan, math.nan, math.nan)


def _distance_change(now: Tensor, before: Tensor, clean: Tensor, seed: int) -> Estimate:
    if len(clean) < 2:  # a distribution cannot be fitted to one face
        return _NOTHING

    def percent(pick: Indices) -> float:
        old = frechet_distance(before[pick], clean[pick])
        return 100 * (frechet_distance(now[pick], clean[pick]) / old - 1) if old else math.nan

    return jackknife(percent, len(clean), seed)
