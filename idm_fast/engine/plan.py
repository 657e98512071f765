"""The static list of calls: buffers laid out, every call prepared, nothing left to decide."""

from __future__ import annotations

import torch
from torch import Tensor

from idm_fast.engine.autotune import Autotuner
from idm_fast.engine.bind import Binder, BoundNode, Call
from idm_fast.engine.buffers import Arena, Buffers, images, statistics, viewed
from idm_fast.engine.lower import Lowered
from idm_fast.engine.memory import require
from idm_fast.engine.nodes import Conv
from idm_fast.engine.tables import StepTables
from idm_fast.engine.weights import PackedWeights
from idm_fast.kernels.program import joined


class Plan:
    """``setup()`` once per walk, ``step()`` once per evaluation: the same addresses every time.

    Both read and write only the plan's buffers, its tables and the weights, so a graph may capture either.
    """

    def __init__(
        self, lowered: Lowered, tables: StepTables, weights: PackedWeights, batch: int, arena: Arena, tuner: Autotuner
    ) -> None:
        self.lowered, self.tables = lowered, tables
        self.seeds = torch.zeros(batch, dtype=torch.int64, device=weights.device)
        nodes = (*lowered.setup, *lowered.step)
        places, self.nbytes = images(nodes)
        if self.nbytes > arena.nbytes:
            require(self.nbytes, weights.device)
        memory = arena.take(self.nbytes)
        tensors = {value: viewed(memory, offset, value) for value, offset in places.items()}
        self.buffers = Buffers(tensors, {}, tables.row, tables.rows, tables.coefficients, tables.step, self.seeds)
        binder = Binder(self.buffers, weights, tuner)
        counts = {n.out_stats: binder.pieces(n) for n in nodes if isinstance(n, Conv) and n.out_stats}
        self.buffers.stats, self.stats_nbytes = statistics(nodes, counts, weights.device)
        self.setup_calls = [binder.bind(node) for node in lowered.setup]
        self.step_calls = [binder.bind(node) for node in lowered.step]
        begin, end = lowered.inner
        self._outer_calls = [*self.step_calls[:begin], *self.step_calls[end:]]
        # Neighbours that are native calls run as one program, without Python in between.
        self._setup, self._step = _joined(self.setup_calls), _joined(self.step_calls)
        self._outer = _joined(self._outer_calls)

    @property
    def x(self) -> Tensor:
        return self.buffers.tensors[self.lowered.x]

    @property
    def history(self) -> Tensor:
        return self.buffers.tensors[self.lowered.history]

    @property
    def cond(self) -> Tensor | None:
        return None if self.lowered.cond is None else self.buffers.tensors[self.lowered.cond]

    def setup(self) -> None:
        for call in self._setup:
            call()

    def enter(self) -> None:
        """The network's next input, anew from x: somebody has changed it between two steps."""
        self.setup_calls[0].call()

    def step(self, reuse: bool = False) -> None:
        """``reuse``: without the inner levels, whose last result is still there."""
        for call in self._outer if reuse else self._step:
            call()


def _joined(calls: list[BoundNode]) -> list[Call]:
    return joined([bound.call for bound in calls])
