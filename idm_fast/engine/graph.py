"""A plan as CUDA graphs: the whole walk in one, or, where that would be too large, one step that is replayed.

A walk's graph holds the step counter's reset, the time table, the condition half and all evaluations; of a latent walk
the encoder and the decoder too. So a run is the copies of its images and one launch. Nothing in it depends on the host:
coefficients and times lie in tables that ``use_table`` writes, weights are read where they lie. Another number of
evaluations is another graph, other numbers in the tables or weights are not.

Not used, and why: a conditional WHILE node would make the graph of any walk as small as one step's, but torch has no
way to capture one (only IF nodes, under private names), and beyond the bound a launch per step is a part of a per cent
of it. Programmatic dependent launch (a kernel's prologue beside the tail of the one before; in a graph an edge of its
own kind) needs kernels that wait where they first read their inputs: ours do not yet, and without a device the order
of such reads and writes cannot be tried.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable

from idm_fast.engine.graph_pool import GraphPool, Key
from idm_fast.engine.loop import EagerLoop

# Calls in one graph. Instantiating costs some microseconds and kilobytes a kernel; a launch beyond that many gains
# nothing, since the device is busy for milliseconds when the host prepares the next.
MOST_CALLS = 8192


class GraphLoop:
    """``EagerLoop`` with every call of the device recorded once and replayed."""

    def __init__(self, eager: EagerLoop, pool: GraphPool) -> None:
        self.eager, self.pool, self.most_calls = eager, pool, MOST_CALLS
        self._owner = pool.new_owner()
        weakref.finalize(self, pool.abandon, self._owner).atexit = False

    def prepare(self, evaluations: int | None) -> bool:
        """Captures what is missing, after the plan has run once call by call: no capture may compile or tune."""
        ran = self.eager.prepare(evaluations)
        keys = self._keys(evaluations)
        if not self.pool.has(self._owner, keys):
            self.pool.runtime.warm_up(self._once)
            self.pool.capture(self._owner, {key: self._work(key) for key in keys})
            ran = True
        return ran

    def setup(self) -> None:
        self.pool.replay(self._owner, ("setup", 0))
        self.eager.moved(0)

    def step(self, e: int) -> None:
        self.eager.seek(e)
        self.eager.moved(-1)  # whatever happens on the way
        self.pool.replay(self._owner, ("step", int(self.eager.reuses(e))))
        self.eager.moved(e + 1)

    def finish(self) -> None:
        if self.eager.plan.finishes:
            self.pool.replay(self._owner, ("finish", 0))

    def walk(self, evaluations: int) -> None:
        keys = self._keys(evaluations)
        if len(keys) == 1:
            self.eager.moved(-1)
            self.pool.replay(self._owner, keys[0])
            return
        self.setup()
        for e in range(evaluations):
            self.step(e)
        self.finish()

    def moved(self, to: int) -> None:
        self.eager.moved(to)

    def _keys(self, evaluations: int | None) -> list[Key]:
        calls = len(self.eager.plan.step_calls)
        if evaluations is not None and evaluations * calls <= self.most_calls:
            return [("walk", evaluations)]
        finish: list[Key] = [("finish", 0)] if self.eager.plan.finishes else []
        return [("setup", 0), ("step", 0), *([("step", 1)] if self.eager.cache_every > 1 else []), *finish]

    def _work(self, key: Key) -> Callable[[], object]:
        kind, number = key
        if kind == "step":
            return lambda: self.eager.plan.step(bool(number))
        if kind == "finish":
            return self.eager.plan.finish
        return self._setup if kind == "setup" else lambda: self._walk(number)

    def _setup(self) -> None:
        self.eager.tables.step.zero_()
        self.eager.tables.compute()
        self.eager.plan.setup()

    def _walk(self, evaluations: int) -> None:
        self._setup()
        for e in range(evaluations):
            self.eager.plan.step(self.eager.reuses(e))
        self.eager.plan.finish()

    def _once(self) -> None:
        """Every call that any graph of the plan holds."""
        self._walk(1)
        if self.eager.cache_every > 1:
            self.eager.plan.step(True)
        self.eager.moved(-1)
