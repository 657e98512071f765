"""``Engine``: a compiled network with its walk from noise to picture."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, NoReturn

import torch
from torch import Tensor

from idm_fast.diffusion import Guidance, SamplerTable
from idm_fast.engine.autotune import Autotuner, Policy
from idm_fast.engine.buffers import Arena
from idm_fast.engine.checks import check_instruction_set, check_same, check_shape, check_shared, instruction_set
from idm_fast.engine.graph import GraphLoop
from idm_fast.engine.loop import EagerLoop, Loop
from idm_fast.engine.lossy import check_reuse
from idm_fast.engine.lower import Lowered, lower
from idm_fast.engine.memory import exhausted
from idm_fast.engine.nodes import EightBit, Node
from idm_fast.engine.plan import Plan
from idm_fast.engine.precision import chosen_device, chosen_dtype
from idm_fast.engine.surroundings import shielded
from idm_fast.engine.tables import StepTables
from idm_fast.engine.weights import PackedWeights
from idm_fast.engine.writer import Shape
from idm_fast.errors import IdmFastError
from idm_fast.kernels.dispatch import BackendError, use_backend
from idm_fast.models.unet import UNet

Callback = Callable[[int, Tensor, Tensor], None]


@dataclass(frozen=True)
class EngineOptions:
    """``backend``: kernel back ends in order of preference ("cpu,torch"); None: all of them.

    ``autotune``: whether each call's back end is measured ("on"), looked up in what was measured before ("cached") or
    the first of the table that can run it ("off"); ``cache``: the file of measurements, None for the user's own.
    ``weights``: those of another engine of the same network and dtype, to share them. ``arena``: memory that engines
    take turns in: ``run`` is safe then, ``load`` and ``step`` are those of one engine at a time.
    ``graph``: on CUDA a walk is captured and replayed; False: call by call. ``cache_every`` k > 1 is lossy: only every
    k-th evaluation runs the whole network, those between reuse what the levels below the finest gave last.
    """

    backend: str | None = None
    weights: PackedWeights | None = None
    arena: Arena | None = None
    autotune: Policy = "cached"
    cache: Path | None = None
    graph: bool = True
    cache_every: int = 1


@dataclass(frozen=True)
class Memory:
    """Bytes held by an engine; ``weights``, ``graph_pool``, and all of ``workspace`` but its tables, may be shared.

    ``weights`` of a CPU are there twice, packed for its instructions and in their own order, from which other back ends
    run and a swap packs anew; the model that was compiled is not counted.
    """

    weights: int
    workspace: int
    graph_pool: int = 0


class Engine:
    """Made by ``Engine.compile``. One walk at a time: ``run`` waits for another thread's to end."""

    def __init__(self, plan: Plan, table: SamplerTable, weights: PackedWeights, arena: Arena, loop: Loop) -> None:
        self._plan, self._tables, self._loop, self.weights, self.arena = plan, plan.tables, loop, weights, arena
        self._table = table
        self._isa = instruction_set()

    def __reduce__(self) -> NoReturn:
        raise IdmFastError(
            "Engine: a compiled plan has addresses in it and cannot be pickled or copied; compile it anew"
        )

    @classmethod
    @shielded
    def compile(
        cls,
        model: UNet,
        shape: Shape,  # N, H, W
        table: SamplerTable,
        *,
        dtype: torch.dtype | str | None = None,
        device: torch.device | str = "cpu",
        options: EngineOptions | None = None,
    ) -> Engine:
        """The plan of ``model`` for N images of H x W pixels and a walk of at most ``table.evaluations`` evaluations.

        Raises ``IdmFastError`` for a shape the network cannot take, an unknown dtype, device or back end, and back
        ends of which none can run some call; ``OutOfMemory`` with the need and what there is.
        """
        options = options or EngineOptions()
        place = chosen_device(device)
        made = ingredients(model, shape, table, place, *chosen_dtype(dtype, place, options.backend), options)
        with allotted(options, made.arena, shape):
            made.load(table)
            plan = Plan(made.lowered, made.tables, made.weights, shape[0], made.arena, made.tuner)
        made.tuner.save()
        return cls(plan, table, made.weights, made.arena, loop_of(plan, options))

    @property
    def nodes(self) -> tuple[Node, ...]:
        """The calls of one evaluation, each with its layer, operation, backend, FLOPs and bytes."""
        return tuple(bound.node for bound in self._plan.step_calls)

    @property
    def table(self) -> SamplerTable:
        """What ``run`` walks."""
        return self._table

    @property
    def capacity(self) -> int:
        """The most evaluations of a table that ``use_table`` takes."""
        return self._tables.capacity

    @property
    def launches(self) -> int:
        """Calls per evaluation."""
        return len(self._plan.step_calls)

    @shielded
    def run(
        self,
        start: Tensor,
        seeds: Tensor,
        cond: Tensor | None = None,
        callback: Callback | None = None,
        guidance: Guidance | None = None,
    ) -> Tensor:
        """Walks the table from ``start`` [N, C, H, W] and returns the images: float32, channels_last.

        As ``diffusion.sample`` with the network in place: ``seeds`` int64 [N], ``cond`` [N, Cc, H, W] float32;
        ``callback(e, x, x0_hat)`` after evaluation e, of tensors that are used again; neither it nor ``guidance``,
        which runs on the host between two steps, may use the engine. With either a GPU replays single steps.
        """
        with self.arena.turn():
            steps = callback is not None or guidance is not None
            self._begin(start, seeds, cond, None if steps else self._tables.evaluations)
            if steps:
                self._loop.setup()
                self._guided(callback, guidance)
                self._loop.finish()
            else:
                self._loop.walk(self._tables.evaluations)
            return self._plan.result.clone()

    def _guided(self, callback: Callback | None, guidance: Guidance | None) -> None:
        plan = self._plan
        steer = None if guidance is None else guidance.begin(self._table)
        for e in range(self._tables.evaluations):
            self._loop.step(e)
            with self.arena.interrupted():
                if steer is not None and steer(e, plan.x, plan.history):
                    plan.enter()
                if callback is not None:
                    callback(e, plan.x, plan.history)

    @shielded
    def load(self, start: Tensor, seeds: Tensor, cond: Tensor | None = None) -> None:
        """The beginning of a walk: what depends on the images alone is computed here."""
        with self.arena.turn():
            self._begin(start, seeds, cond, None)
            self._loop.setup()

    @shielded
    def step(self, e: int) -> None:
        """Evaluation ``e`` of the network and the update behind it."""
        if not 0 <= e < self._tables.evaluations:
            raise IdmFastError(f"Engine: step must lie in 0..{self._tables.evaluations - 1}, got {e}")
        with self.arena.turn():
            self._loop.step(e)

    def _begin(self, start: Tensor, seeds: Tensor, cond: Tensor | None, evaluations: int | None) -> None:
        """Puts the images where the plan reads them, and has the loop ready for a walk, or for single steps (None)."""
        plan = self._plan
        check_instruction_set("Engine", self._isa)
        check_same("Engine", "start", start, plan.start)
        check_same("Engine", "seeds", seeds, plan.seeds)
        if (cond is None) != (plan.cond is None):
            raise IdmFastError(f"Engine: cond must be {'none' if plan.cond is None else 'given'}, got the contrary")
        if cond is not None and plan.cond is not None:
            check_same("Engine", "cond", cond, plan.cond)
        self._put(start, seeds, cond)
        try:
            if self._loop.prepare(evaluations):
                self._put(start, seeds, cond)
        except torch.OutOfMemoryError as error:
            n, _, height, width = plan.x.shape
            raise exhausted((n, height, width), error) from None

    def _put(self, start: Tensor, seeds: Tensor, cond: Tensor | None) -> None:
        plan = self._plan
        plan.start.copy_(start)
        plan.seeds.copy_(seeds)
        if cond is not None and plan.cond is not None:
            plan.cond.copy_(cond)

    @shielded
    def use_table(self, table: SamplerTable) -> None:
        """Other coefficients, of at most as many evaluations as the engine was compiled for; nothing is recompiled.

        A graph is captured anew only for another number of evaluations.
        """
        if table.evaluations > self._tables.capacity:
            raise IdmFastError(
                f"use_table: table must have at most {self._tables.capacity} evaluations, as the engine was compiled "
                f"for, got {table.evaluations}"
            )
        kinds = ["learned" if each.learned_variance else "fixed" for each in (self._table, table)]
        if kinds[0] != kinds[1]:
            raise IdmFastError(
                f"use_table: variance must be {kinds[0]}, as the engine was compiled for, got {kinds[1]}"
            )
        with self.arena.turn():
            if table is not self._table:
                self._tables.load(table)
                self._table = table

    def release_graphs(self) -> None:
        """Forgets all captured graphs of the arena; the next run captures its own anew, as torch is set then."""
        with self.arena.turn():
            self.arena.graphs.release()

    @shielded
    def swap_weights(self, model: UNet) -> None:
        """Another network's weights in the same memory, for all engines that share them.

        Engines of another arena must not be running. Raises ``IdmFastError`` for one of another shape; the engine then
        keeps its own.
        """
        with self.arena.turn():
            self.weights.swap(model)

    def memory(self) -> Memory:
        workspace = self.arena.nbytes + self._plan.stats_nbytes + self._tables.nbytes
        return Memory(self.weights.nbytes, workspace, self.arena.graphs.nbytes)

    @shielded
    def times(self, repeats: int = 5) -> tuple[float, ...]:
        """Median seconds of each of ``nodes``, run one by one; the buffers' contents do not matter, and are lost."""
        medians = []
        with self.arena.turn():
            self._loop.moved(-1)
            for bound in self._plan.step_calls:
                taken = []
                for _ in range(repeats + 1):
                    self._tables.step.zero_()
                    taken.append(self.arena.runtime.seconds(bound.call))
                medians.append(sorted(taken[1:])[repeats // 2])
        return tuple(medians)

    @shielded
    def visit(self, around: Callable[[Node, Callable[[], object]], None]) -> None:
        """The first evaluation, call by call and without a graph: ``around(node, call)`` runs each. For profiles."""
        with self.arena.turn():
            self._loop.moved(-1)
            self._tables.step.zero_()
            for bound in self._plan.step_calls:
                around(bound.node, bound.call)


class Ingredients(NamedTuple):
    """What the plan of a walk is made of."""

    lowered: Lowered
    tables: StepTables
    weights: PackedWeights
    arena: Arena
    tuner: Autotuner

    def load(self, table: SamplerTable) -> None:
        self.tables.load(table)
        self.tables.refresh()
        self.tables.row.copy_(self.tables.rows[:1])  # to be measured, a quantised call needs its steps


def ingredients(
    model: UNet,
    shape: Shape,  # of what the network works on
    table: SamplerTable,
    device: torch.device,
    dtype: torch.dtype,
    quantised: EightBit | None,
    options: EngineOptions,
) -> Ingredients:
    """Raises ``IdmFastError`` as ``Engine.compile`` does."""
    _check(model, shape)
    check_shared("Engine", options.weights, options.arena, model.config, dtype, device)
    weights = options.weights or PackedWeights(model, dtype, device)
    check_reuse(model.config, options.cache_every)
    learned = table.learned_variance
    if learned and model.config.out_channels != 2 * model.config.in_channels:
        expected = f"{2 * model.config.in_channels} output channels for a learned variance"
        raise IdmFastError(f"Engine: model must have {expected}, got {model.config.out_channels}")
    reusable = options.cache_every > 1
    lowered = lower(model, shape, dtype, quantised=quantised, reusable=reusable, learned_variance=learned)
    tables = StepTables(lowered, weights, table.evaluations)
    tuner = Autotuner(options.autotune, options.cache)
    return Ingredients(lowered, tables, weights, options.arena or Arena(device), tuner)


@contextmanager
def allotted(options: EngineOptions, arena: Arena, shape: Shape) -> Iterator[None]:
    """Plans are bound inside: with the back ends that are asked for, and errors in our words."""
    try:
        with nullcontext() if options.backend is None else use_backend(options.backend), arena.turn():
            yield
    except BackendError as error:
        raise IdmFastError(str(error)) from None
    except torch.OutOfMemoryError as error:
        raise exhausted(shape, error) from None


def loop_of(plan: Plan, options: EngineOptions) -> Loop:
    eager = EagerLoop(plan, options.cache_every)
    return GraphLoop(eager, plan.arena.graphs) if options.graph and plan.arena.runtime.captures else eager


def _check(model: UNet, shape: Shape) -> None:
    c = model.config
    check_shape("Engine", shape, c.size_multiple)
    if c.num_classes:
        raise IdmFastError(f"Engine: model must have no classes = 0, got {c.num_classes}")
    for name, only in (("middle_scale", 1), ("center_input", False)):
        if getattr(c, name) != only:
            raise IdmFastError(
                f"Engine: model must have {name} = {only}, got {getattr(c, name)} (engine=False runs plain modules)"
            )
