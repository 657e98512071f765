"""The static list of calls: buffers laid out, every call prepared, nothing left to decide."""

from __future__ import annotations

import torch
from torch import Tensor

from idm_fast.engine.bind import Bound, Buffers, bind
from idm_fast.engine.lower import Lowered
from idm_fast.engine.nodes import Value
from idm_fast.engine.tables import StepTables
from idm_fast.engine.weights import PackedWeights


class Plan:
    """``setup()`` once per walk, ``step()`` once per evaluation: the same addresses every time.

    Both read and write only the plan's buffers, its tables and the weights, so a graph may capture either.
    """

    def __init__(self, lowered: Lowered, tables: StepTables, weights: PackedWeights, batch: int) -> None:
        device = weights.device
        self.lowered, self.tables = lowered, tables
        self.seeds = torch.zeros(batch, dtype=torch.int64, device=device)
        nodes = (*lowered.setup, *lowered.step)
        values = dict.fromkeys(v for node in nodes for v in (*node.reads, *node.writes) if isinstance(v, Value))
        tensors = {value: _tensor(value, device) for value in values}
        self.buffers = Buffers(
            tensors, {}, tables.row, tables.rows, tables.coefficients, tables.step, self.seeds
        )  # fmt: skip
        self.setup_calls = [bind(node, self.buffers, weights) for node in lowered.setup]
        self.step_calls = [bind(node, self.buffers, weights) for node in lowered.step]

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.buffers.tensors.values())

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
        _run(self.setup_calls)

    def step(self) -> None:
        _run(self.step_calls)


def _run(calls: list[Bound]) -> None:
    for bound in calls:
        bound.call()


def _tensor(value: Value, device: torch.device) -> Tensor:
    if len(value.shape) != 4:
        return torch.zeros(value.shape, dtype=value.dtype, device=device)
    n, c, h, w = value.shape
    return torch.zeros((n, h, w, c), dtype=value.dtype, device=device).permute(0, 3, 1, 2)
