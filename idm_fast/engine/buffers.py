"""Where the values of a plan lie: one arena in which memory is used again as soon as nobody reads it any more."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from threading import RLock
from typing import TypeVar

import torch
from torch import Tensor

from idm_fast.engine.graph_pool import GraphPool
from idm_fast.engine.memory import require
from idm_fast.engine.nodes import Columns, Node, Operand, StatsValue, Value
from idm_fast.engine.runtime import Runtime, runtime_of
from idm_fast.errors import IdmFastError
from idm_fast.kernels.channel_stats import ChannelStats

ALIGNMENT = 256  # bytes: whole cache lines, and what every vector load and copy engine likes
Placed = TypeVar("Placed", bound=Operand)
Stats = tuple[dict[StatsValue, ChannelStats], int]
Life = tuple[int, int]  # numbers of the first and the last node that touch it


class Arena:
    """Memory that plans of one restorer take turns in; ``lock`` is held by the one that runs.

    It only grows. A plan made before it grew keeps the old memory alive: who caches plans drops those whose
    ``generation`` is past.
    """

    def __init__(self, device: torch.device, runtime: Runtime | None = None) -> None:
        self.device, self.lock, self.generation = device, RLock(), 0
        self.runtime = runtime or runtime_of(device)
        self.graphs = GraphPool(self.runtime)
        self.walking = False  # a callback runs in the middle of a walk
        self._memory = torch.empty(0, dtype=torch.uint8, device=device)

    @property
    def nbytes(self) -> int:
        return self._memory.numel()

    @contextmanager
    def turn(self) -> Iterator[None]:
        """The right to use it, behind whoever used it before, on another thread or another stream.

        Raises ``IdmFastError`` in a walk's own callback: the lock lets its thread in, and the walk's values would go.
        """
        with self.lock:
            if self.walking:
                raise IdmFastError("Engine: a callback must leave the engines of its walk's arena alone until it ends")
            with self.runtime.turn():
                yield

    @contextmanager
    def interrupted(self) -> Iterator[None]:
        """Of a walk that goes on behind the block."""
        self.walking = True
        try:
            yield
        finally:
            self.walking = False

    def take(self, nbytes: int) -> Tensor:
        """The first ``nbytes`` of it. Raises ``OutOfMemory``, or what torch raises, where there is no such memory."""
        with self.lock:
            if nbytes > self.nbytes:
                require(nbytes, self.device)
                self._memory = torch.zeros(nbytes, dtype=torch.uint8, device=self.device)
                self.generation += 1
            return self._memory[:nbytes]


@dataclass
class Buffers:
    """Everything that the calls of a plan read and write, weights apart."""

    tensors: dict[Value, Tensor]
    stats: dict[StatsValue, ChannelStats]
    row: Tensor  # float32 [1, S]
    rows: Tensor  # float32 [T, S]
    coefficients: Tensor  # float32 [T, 8], the sampler's
    step: Tensor  # int64 [1]
    seeds: Tensor  # int64 [N]

    def columns(self, columns: Columns | None) -> Tensor | None:
        """[N, width] of the time row: the same for every sample."""
        return None if columns is None else self.row[:, slice(*columns)].expand(len(self.seeds), -1)


def lifetimes(nodes: Sequence[Node], kind: type[Placed]) -> dict[Placed, Life]:
    """From the node that writes a value to the last that reads it, both included: a result lies beside its inputs."""
    lives: dict[Placed, Life] = {}
    for index, node in enumerate(nodes):
        touched: list[Operand] = [*node.reads, *node.writes]
        for value in touched:
            if isinstance(value, kind):
                first = lives[value][0] if value in lives else index
                lives[value] = (0, len(nodes) - 1) if value.fixed else (first, index)
    return lives


def offsets(sizes: Mapping[Placed, int], lives: Mapping[Placed, Life]) -> tuple[dict[Placed, int], int]:
    """(offset of each value, bytes in all): the largest first, each as low as those beside it in time allow."""
    placed: list[tuple[int, int, Life]] = []  # begin, end, life
    found: dict[Placed, int] = {}
    for value in sorted(sizes, key=lambda v: (-sizes[v], lives[v])):
        size = -(-sizes[value] // ALIGNMENT) * ALIGNMENT
        first, last = lives[value]
        begin = 0
        for low, high, life in sorted(placed):
            if life[1] < first or last < life[0]:
                continue
            if begin + size <= low:
                break
            begin = max(begin, high)
        found[value] = begin
        placed.append((begin, begin + size, (first, last)))
    return found, max((end for _, end, _ in placed), default=0)


def images(nodes: Sequence[Node]) -> tuple[dict[Value, int], int]:
    """``offsets`` of every value of ``nodes`` but the statistics."""
    lives = lifetimes(nodes, Value)
    return offsets({value: value.nbytes for value in lives}, lives)


def statistics(nodes: Sequence[Node], pieces: Mapping[StatsValue, int], device: torch.device) -> Stats:
    """Room for all statistics, each in so many pieces."""
    sizes = {}
    for value, count in pieces.items():
        n, c = value.image.shape[:2]
        sizes[value] = 4 * (n * count * 2 * c + count)
    places, total = offsets(sizes, lifetimes(nodes, StatsValue))
    memory = torch.zeros(total, dtype=torch.uint8, device=device)
    found = {}
    for value, count in pieces.items():
        n, c = value.image.shape[:2]
        floats = memory[places[value] :][: sizes[value]].view(torch.float32)
        found[value] = ChannelStats(floats[:-count].view(n, count, 2, c), floats[-count:])
    return found, total


def viewed(memory: Tensor, offset: int, value: Value) -> Tensor:
    """``value`` at a byte of ``memory``."""
    flat = memory[offset : offset + value.nbytes].view(value.dtype)
    if len(value.shape) != 4:
        return flat.view(value.shape)
    n, c, h, w = value.shape
    return flat.view(n, h, w, c).permute(0, 3, 1, 2)
