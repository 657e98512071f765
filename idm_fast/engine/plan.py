"""The static list of calls: buffers laid out, every call prepared, nothing left to decide."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from idm_fast.engine.autotune import Autotuner
from idm_fast.engine.bind import Binder, BoundNode, Call
from idm_fast.engine.buffers import Arena, Buffers, images, statistics, viewed
from idm_fast.engine.lower import Lowered
from idm_fast.engine.nodes import Conv, Node
from idm_fast.engine.precision import check_range
from idm_fast.engine.tables import StepTables
from idm_fast.engine.weights import PackedWeights
from idm_fast.kernels.program import joined


class LaidOut(NamedTuple):
    """Nodes with their memory: ``nbytes`` of the arena, ``stats_nbytes`` of their own."""

    buffers: Buffers
    calls: list[BoundNode]
    nbytes: int
    stats_nbytes: int


def laid_out(
    nodes: Sequence[Node],
    weights: PackedWeights,
    arena: Arena,
    tuner: Autotuner,
    *,
    row: Tensor,
    rows: Tensor,
    coefficients: Tensor,
    step: Tensor,
    seeds: Tensor,
) -> LaidOut:
    """``nodes`` bound to buffers in ``arena``; the rest is what ``Buffers`` holds beside them."""
    places, nbytes = images(nodes)
    memory = arena.take(nbytes)
    tensors = {value: viewed(memory, offset, value) for value, offset in places.items()}
    buffers = Buffers(tensors, {}, row, rows, coefficients, step, seeds)
    binder = Binder(buffers, weights, tuner)
    counts = {n.out_stats: binder.pieces(n) for n in nodes if isinstance(n, Conv) and n.out_stats}
    buffers.stats, stats_nbytes = statistics(nodes, counts, weights.device)
    return LaidOut(buffers, [binder.bind(node) for node in nodes], nbytes, stats_nbytes)


class Plan:
    """``setup()`` once per walk, ``step()`` once per evaluation, ``finish()`` behind them: always the same addresses.

    All read and write only the plan's buffers, its tables and the weights, so a graph may capture them. A walk's images
    are put into ``start`` and ``cond``, and lie in ``result`` at its end.
    """

    finishes = False  # whether ``finish`` does anything

    def __init__(
        self, lowered: Lowered, tables: StepTables, weights: PackedWeights, batch: int, arena: Arena, tuner: Autotuner
    ) -> None:
        self.lowered, self.tables, self.weights, self.arena = lowered, tables, weights, arena
        self.seeds = torch.zeros(batch, dtype=torch.int64, device=weights.device)
        laid = laid_out(
            (*lowered.setup, *lowered.step), weights, arena, tuner, row=tables.row, rows=tables.rows,
            coefficients=tables.coefficients, step=tables.step, seeds=self.seeds,
        )  # fmt: skip
        self.buffers, self.nbytes, self.stats_nbytes = laid.buffers, laid.nbytes, laid.stats_nbytes
        first = len(lowered.setup)
        self.setup_calls, self.step_calls = laid.calls[:first], laid.calls[first:]
        begin, end = lowered.inner
        self._outer_calls = [*self.step_calls[:begin], *self.step_calls[end:]]
        # Neighbours that are native calls run as one program, without Python in between.
        self._setup, self._step = _joined(self.setup_calls), _joined(self.step_calls)
        self._outer = _joined(self._outer_calls)

    @property
    def x(self) -> Tensor:
        return self.buffers.tensors[self.lowered.x]

    @property
    def start(self) -> Tensor:
        return self.x

    @property
    def result(self) -> Tensor:
        return self.x

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

    def finish(self) -> None:
        """Of a walk over pictures x itself is the result."""

    def check_range(self) -> bool:
        """At the first images of new weights in float16: whether it has run, and written over its input."""
        if self.weights.dtype != torch.float16 or self.weights.range_checked == self.weights.version:
            return False
        self.tables.refresh()
        self.tables.step.zero_()
        check_range([*self.setup_calls, *self.step_calls], self.buffers.tensors)
        self.weights.range_checked = self.weights.version
        return True


def _joined(calls: list[BoundNode]) -> list[Call]:
    return joined([bound.call for bound in calls])
