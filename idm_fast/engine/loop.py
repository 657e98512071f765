"""How a plan is walked: call by call. graph.py walks the same plan as CUDA graphs."""

from __future__ import annotations

from typing import Protocol

import torch

from idm_fast.engine.plan import Plan
from idm_fast.engine.precision import check_range
from idm_fast.engine.tables import StepTables
from idm_fast.engine.weights import PackedWeights


class Loop(Protocol):
    """``setup`` and then ``step`` for e = 0, 1, ..., or ``walk`` for all of it, on images that lie in the plan."""

    def prepare(self, evaluations: int | None) -> bool:
        """Once the images lie there: ready for a walk of so many evaluations, or for single steps (None).

        True: the network has run meanwhile, and the images must be put there again.
        """

    def setup(self) -> None: ...

    def step(self, e: int) -> None: ...

    def walk(self, evaluations: int) -> None: ...

    def moved(self, to: int) -> None:
        """Others have moved the step counter; -1: somewhere."""


class EagerLoop:
    """``cache_every`` k: all but every k-th step reuse what the inner levels gave last (lossy for k > 1)."""

    def __init__(self, plan: Plan, tables: StepTables, weights: PackedWeights, cache_every: int = 1) -> None:
        self.plan, self.tables, self.weights, self.cache_every = plan, tables, weights, cache_every
        self._at = -1  # what the step counter says; -1: unknown

    def prepare(self, evaluations: int | None) -> bool:
        if self.weights.dtype != torch.float16 or self.weights.range_checked == self.weights.version:
            return False
        self.tables.refresh()
        self.tables.step.zero_()
        self._at = -1
        check_range([*self.plan.setup_calls, *self.plan.step_calls], self.plan.buffers.tensors)
        self.weights.range_checked = self.weights.version
        return True

    def reuses(self, e: int) -> bool:
        return e % self.cache_every != 0

    def setup(self) -> None:
        self.tables.refresh()
        self.seek(0)
        self.plan.setup()

    def step(self, e: int) -> None:
        self.seek(e)
        self._at = -1  # whatever happens on the way
        self.plan.step(self.reuses(e))
        self._at = e + 1

    def moved(self, to: int) -> None:
        self._at = to

    def seek(self, e: int) -> None:
        """The step counter at e; written only where it is not there already."""
        if e != self._at:
            self.tables.step.fill_(e)
            self._at = e

    def walk(self, evaluations: int) -> None:
        self.setup()
        for e in range(evaluations):
            self.step(e)
