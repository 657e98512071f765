"""How a plan is walked: call by call. graph.py walks the same plan as CUDA graphs."""

from __future__ import annotations

from typing import Protocol

from idm_fast.engine.plan import Plan


class Loop(Protocol):
    """``setup``, then ``step`` for e = 0, 1, ... and ``finish``, or ``walk`` for all of it, on images that lie in the
    plan."""

    def prepare(self, evaluations: int | None) -> bool:
        """Once the images lie there: ready for a walk of so many evaluations, or for single steps (None).

        True: the network has run meanwhile, and the images must be put there again.
        """

    def setup(self) -> None: ...

    def step(self, e: int) -> None: ...

    def finish(self) -> None: ...

    def walk(self, evaluations: int) -> None: ...

    def moved(self, to: int) -> None:
        """Others have moved the step counter; -1: somewhere."""


class EagerLoop:
    """``cache_every`` k: all but every k-th step reuse what the inner levels gave last (lossy for k > 1)."""

    def __init__(self, plan: Plan, cache_every: int = 1) -> None:
        self.plan, self.tables, self.cache_every = plan, plan.tables, cache_every
        self._at = -1  # what the step counter says; -1: unknown

    def prepare(self, evaluations: int | None) -> bool:
        ran = self.plan.check_range()
        if ran:
            self._at = -1
        return ran

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

    def finish(self) -> None:
        self.plan.finish()

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
        self.finish()
