"""All that changes from step to step, as tensors that a step indexes by the device's own counter."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from idm_fast.diffusion import SamplerTable
from idm_fast.engine.lossy import TIERS
from idm_fast.engine.lower import Lowered, Range
from idm_fast.engine.nodes import Columns, Weight
from idm_fast.engine.weights import PackedWeights, State
from idm_fast.kernels import time_embedding
from idm_fast.kernels.dispatch import use_backend
from idm_fast.models.blocks import sinusoid

ROWS = 16  # of one product: a row's sums are taken in an order that depends on how many rows there are


class StepTables:
    """``coefficients`` [T, 8] is the sampler's table; ``rows`` [T, S] what each block adds for the time.

    T = ``capacity``; ``rows`` has the next multiple of ``ROWS``, so that a walk is the same bits in tables of any
    capacity. After the projections' columns come those of each quantised convolution: they follow from the norm's
    gamma and beta and the time's scale and shift, and from no data.
    """

    def __init__(self, lowered: Lowered, weights: PackedWeights, capacity: int) -> None:
        self._lowered, self._weights, self.capacity = lowered, weights, capacity
        self._matrix, self._bias = weights.made("time.projections", self._projections)
        self._mlp = weights.made("time.mlp", _mlp)
        self._columns = self._matrix.shape[0]
        width = max((each.columns[1] for each in lowered.ranges), default=self._columns)
        device = weights.device
        room = -(-capacity // ROWS) * ROWS

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.float32, device=device)

        self.coefficients, self.rows, self.row = zeros(capacity, 8), zeros(room, width), zeros(1, width)
        self.step = torch.zeros(1, dtype=torch.int64, device=device)
        self._times = zeros(room)
        self.evaluations = 0
        self._computed: int | None = None  # version of the weights that made ``rows``

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in (self.coefficients, self.rows, self.row, self.step, self._times))

    def load(self, table: SamplerTable) -> None:
        """What the host knows of a walk of at most ``capacity`` evaluations, in place; ``compute`` makes the rest."""
        device, count = self._weights.device, table.evaluations
        self.coefficients[:count].copy_(table.float32(device))
        self._times[:count].copy_(torch.from_numpy(table.network_time.astype("float32")))
        self.evaluations = count
        self._computed = None

    def refresh(self) -> None:
        """``compute`` where the table or the weights have changed."""
        if self._computed != self._weights.version:
            self.compute()
            self._computed = self._weights.version

    def compute(self) -> None:
        """``rows`` of the times that were loaded and of the weights: always the same calls, so a graph may hold it."""
        for begin in range(0, len(self.rows), ROWS):
            self._compute(self._times[begin : begin + ROWS], self.rows[begin : begin + ROWS])

    def _compute(self, times: Tensor, rows: Tensor) -> None:
        config = self._weights.config
        fc1_weight, fc1_bias, fc2_weight, fc2_bias = self._mlp
        if config.freq_shift:  # which the operation does not know
            wave = sinusoid(times, config.time_width, config.embedding_order, config.freq_shift)
            embedding = F.linear(F.silu(F.linear(wave, fc1_weight, fc1_bias)), fc2_weight, fc2_bias)
            made = F.linear(F.silu(embedding) if config.embed_silu else embedding, self._matrix, self._bias)
        else:
            with use_backend(None):  # once per walk, and not each back end has the time embedding
                made = time_embedding(
                    times, fc1_weight, fc1_bias, fc2_weight, fc2_bias, self._matrix, self._bias,
                    order=config.embedding_order, embed_silu=config.embed_silu,
                )  # fmt: skip
        rows[:, : self._columns].copy_(made)
        for each in self._lowered.ranges:
            rows[:, slice(*each.columns)].copy_(self._range(each, made))

    def _range(self, each: Range, rows: Tensor) -> Tensor:
        gamma, beta = self._weights.norm(each.norm)
        scale, shift = _some(rows, each.scale), _some(rows, each.shift)
        return TIERS[each.tier].activation_scale(gamma, beta, scale, shift, silu=each.silu)

    def _projections(self, state: State) -> tuple[Tensor, ...]:
        def rows(weight: Weight) -> Tensor:
            return state[weight.name].float()

        blocks = self._lowered.projections
        biases = [sum((rows(b) for b in block.biases[1:]), rows(block.biases[0])) for block in blocks]
        return torch.cat([rows(block.weight) for block in blocks]), torch.cat(biases)


def _mlp(state: State) -> tuple[Tensor, ...]:
    return tuple(state[f"time.{name}"].float() for name in ("fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias"))


def _some(rows: Tensor, columns: Columns | None) -> Tensor | None:
    return None if columns is None else rows[:, slice(*columns)]
