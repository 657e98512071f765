"""Walks as graphs, on a runtime that records what torch is told and tells it again: what capture and replay mean.

The fake is as strict as the real one. While it records nothing may be read by the host; what a capture ran leaves no
trace in memory; a replay is the recorded calls on the recorded memory, and no Python of ours.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from threading import Lock, Thread
from types import ModuleType
from typing import Any

import pytest
import torch
from tiny_engine import TINY, tiny_inputs, tiny_network, tiny_table
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from idm_fast.config import DiffusionConfig, ModelConfig
from idm_fast.crops import CropRestorer, SampleSettings
from idm_fast.diffusion import Guidance, SamplerTable, Schedule, build_table
from idm_fast.engine import Engine, EngineOptions, graph
from idm_fast.engine.buckets import bucket
from idm_fast.engine.buffers import Arena
from idm_fast.engine.memory import OutOfMemory
from idm_fast.errors import IdmFastError
from idm_fast.kernels.philox_normal.torch_backend import philox_normal
from idm_fast.kernels.sampler_update.rows import clamped, coefficients, limited, prediction
from idm_fast.ops import OPS

CPU = torch.device("cpu")
LEARNED = build_table(Schedule.linear(), "eps", "ddpm", 4, clamp=1.0, variance="learned")
READS = ("_local_scalar_dense", "is_nonzero", "equal", "nonzero", "masked_select")  # what makes the host wait


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


class _Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, Any]] = []
        self._written: dict[int, tuple[Any, Any]] = {}
        self._made: list[Tensor] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.__name__.split(".")[0] in READS:
            raise RuntimeError(f"operation not permitted when stream is capturing: {func}")
        kwargs = kwargs or {}
        named = dict(zip((a.name for a in func._schema.arguments), args, strict=False)) | kwargs
        for argument in func._schema.arguments:
            tensor = named.get(argument.name)
            if argument.is_write and isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                self._written.setdefault(storage.data_ptr(), (storage, storage.clone()))
        out = func(*args, **kwargs)
        self.calls.append((func, args, kwargs, out))
        given = {t.untyped_storage().data_ptr() for t in _tensors((args, kwargs))}
        self._made.extend(t for t in _tensors(out) if t.untyped_storage().data_ptr() not in given)
        return out

    def leave_no_trace(self) -> None:
        for storage, before in self._written.values():
            storage.copy_(before)
        for tensor in self._made:
            if tensor.is_floating_point():
                tensor.fill_(torch.nan)


class _Recorded:
    def __init__(self, calls: list[tuple[Any, Any, Any, Any]]) -> None:
        self.calls: list[tuple[Any, Any, Any, Any]] | None = calls

    def replay(self) -> None:
        assert self.calls is not None, "a graph that was reset"
        for func, args, kwargs, before in self.calls:
            out = func(*args, **kwargs)
            for new, old in zip(_tensors(out), _tensors(before), strict=True):
                if new.data_ptr() != old.data_ptr():
                    old.copy_(new)

    def reset(self) -> None:
        self.calls = None


class FakeRuntime:
    captures = True

    def __init__(self) -> None:
        self.set: dict[str, object] = {"tf32": False}
        self.live: list[_Recorded] = []
        self.warm_ups = self.exhausted = 0
        self._inside = Lock()
        self._depth = 0

    @contextmanager
    def turn(self) -> Iterator[None]:
        if self._depth == 0:
            assert self._inside.acquire(blocking=False), "two turns at once"
        self._depth += 1
        try:
            yield
        finally:
            self._depth -= 1
            if self._depth == 0:
                self._inside.release()

    def warm_up(self, work: Any) -> None:
        self.warm_ups += 1
        work()

    def new_pool(self) -> object:
        return object()

    def capture(self, work: Any, pool: object) -> tuple[_Recorded, int]:
        if self.exhausted:
            self.exhausted -= 1
            raise torch.OutOfMemoryError("Tried to allocate 2.00 GiB, of which 1.00 GiB is free")
        recorder = _Recorder()
        try:
            with torch.no_grad(), recorder:
                work()
        finally:
            recorder.leave_no_trace()
        self.live.append(_Recorded(recorder.calls))
        return self.live[-1], 100

    def pool_bytes(self, pool: object) -> int:
        return 1000

    def settle(self) -> None: ...

    def settings(self) -> dict[str, object]:
        return dict(self.set)

    def seconds(self, work: Any) -> float:
        work()
        return 1.0

    @property
    def alive(self) -> int:
        return sum(graph.calls is not None for graph in self.live)


def _update(
    x: Tensor, answer: Tensor, history: Tensor, table: Tensor, step: Tensor, seeds: Tensor, entry: Tensor | None,
    threshold: Tensor | None = None, unshuffle: int = 1, base: Tensor | None = None,
) -> None:  # fmt: skip
    """torch's update as it runs on a device; on a CPU it looks at the coefficients first."""
    k_x, k_out, a, b, c, s, clamp, _ = coefficients(table, step)
    x0_hat = limited(prediction(x, answer, k_x, k_out, unshuffle, base), clamp, threshold)
    x.mul_(a).add_(b * x0_hat)
    x.add_(torch.where(c == 0, 0.0, c * history))
    x.add_(s * philox_normal(seeds, tuple(x.shape), clamped(step, len(table))))
    history.copy_(x0_hat)
    if entry is not None:
        entry.copy_(x if unshuffle == 1 else torch.nn.functional.pixel_unshuffle(x, unshuffle))


@pytest.fixture(autouse=True)
def update_on_device(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    module = ModuleType("update_on_device")
    module.update = _update  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "update_on_device", module)
    op = OPS["sampler_update"]
    with op.substituted(replace(op.backends["torch"], function="update_on_device:update")):
        yield


def _compile(arena: Arena | None = None, batch: int = 1, table: SamplerTable | None = None, **options: Any) -> Engine:
    made = EngineOptions(backend="torch", arena=arena, **options)
    learned = table is not None and table.learned_variance
    network = tiny_network(replace(TINY, residual=False, out_channels=6) if learned else TINY)
    return Engine.compile(network, (batch, 16, 16), table or tiny_table(), dtype="fp32", options=made)


@pytest.fixture
def runtime() -> FakeRuntime:
    return FakeRuntime()


@pytest.fixture
def arena(runtime: FakeRuntime) -> Arena:
    return Arena(CPU, runtime)


@pytest.mark.parametrize("solver", ["dpmpp_2m", "ddpm", "learned"])
@pytest.mark.parametrize("cache_every", [1, 2])
def test_a_walk_is_one_graph_and_equals_the_calls(arena: Arena, solver: str, cache_every: int) -> None:
    table = tiny_table(4, solver) if solver != "learned" else LEARNED
    eager = _compile(table=table, cache_every=cache_every)
    made = _compile(arena, table=table, cache_every=cache_every)
    for seed in (5, 6):
        inputs = tiny_inputs(seed=seed)
        expected = eager.run(*inputs)
        assert torch.equal(made.run(*inputs), expected)
        assert torch.equal(made.run(*inputs), expected)
    assert arena.graphs.captures == 1
    assert made.memory().graph_pool == 1100
    assert eager.memory().graph_pool == 0


def test_another_table_of_as_many_steps_and_other_weights_need_no_capture(arena: Arena) -> None:
    made, inputs = _compile(arena), tiny_inputs()
    made.run(*inputs)
    other = tiny_table(3, "ddpm")
    made.use_table(other)
    assert torch.equal(made.run(*inputs), _compile(table=other).run(*inputs))
    made.swap_weights(tiny_network(seed=1))
    fresh = Engine.compile(
        tiny_network(seed=1), (1, 16, 16), other, dtype="fp32", options=EngineOptions(backend="torch")
    )
    assert torch.equal(made.run(*inputs), fresh.run(*inputs))
    assert arena.graphs.captures == 1
    short = tiny_table(2)
    for each in (made, fresh):
        each.use_table(short)
    assert torch.equal(made.run(*inputs), fresh.run(*inputs))
    fresh.use_table(other)
    made.use_table(other)
    assert torch.equal(made.run(*inputs), fresh.run(*inputs))
    assert arena.graphs.captures == 2  # the graph of three steps was kept


def test_a_callback_and_single_steps_replay_a_graph_of_one_step(arena: Arena) -> None:
    eager, made, inputs = _compile(), _compile(arena), tiny_inputs()
    seen: list[list[Tensor]] = [[], []]
    for each, kept in zip((eager, made), seen, strict=True):
        each.run(*inputs, callback=lambda e, x, x0, kept=kept: kept.extend((x.clone(), x0.clone())))
    assert all(torch.equal(a, b) for a, b in zip(*seen, strict=True))
    made.load(*inputs)
    made.step(2)
    made.load(*inputs)
    for e in range(3):
        made.step(e)
    assert torch.equal(made._plan.x, seen[0][-2])
    assert arena.graphs.captures == 2  # setup and step
    assert torch.equal(made.run(*inputs), seen[0][-2])
    assert arena.graphs.captures == 3


@pytest.mark.parametrize("cache_every", [1, 2])
def test_a_guided_walk_replays_steps_and_equals_the_calls(arena: Arena, cache_every: int) -> None:
    """The gradient may ask the host what it likes: it runs between two replays."""
    eager = _compile(table=tiny_table(5), cache_every=cache_every)
    made = _compile(arena, table=tiny_table(5), cache_every=cache_every)
    inputs, results = tiny_inputs(), []
    for each in (eager, made, made):
        guidance = Guidance(lambda x0: (x0 - 0.3) * float(x0.mean() < 9), 0.5, (0.2, 1.0), 2)
        results.append(each.run(*inputs, guidance=guidance))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[1], results[2])
    assert not torch.equal(results[0], eager.run(*inputs))
    assert arena.graphs.captures == (2 if cache_every == 1 else 3)
    assert torch.equal(made.run(*inputs), eager.run(*inputs))


@pytest.mark.parametrize("cache_every", [1, 3])
def test_a_walk_too_large_for_one_graph_replays_its_steps(
    arena: Arena, monkeypatch: pytest.MonkeyPatch, cache_every: int
) -> None:
    eager, inputs = _compile(table=tiny_table(7), cache_every=cache_every), tiny_inputs()
    monkeypatch.setattr(graph, "MOST_CALLS", 3 * eager.launches)
    made = _compile(arena, table=tiny_table(7), cache_every=cache_every)
    assert torch.equal(made.run(*inputs), eager.run(*inputs))
    assert arena.graphs.captures == (2 if cache_every == 1 else 3)
    made.use_table(tiny_table(3))
    eager.use_table(tiny_table(3))
    assert torch.equal(made.run(*inputs), eager.run(*inputs))


def test_the_option_off_captures_nothing(arena: Arena, runtime: FakeRuntime) -> None:
    inputs = tiny_inputs()
    assert torch.equal(_compile(arena, graph=False).run(*inputs), _compile().run(*inputs))
    assert runtime.warm_ups == arena.graphs.captures == 0


def test_a_graph_of_another_setting_is_refused(arena: Arena, runtime: FakeRuntime) -> None:
    made, inputs = _compile(arena), tiny_inputs()
    expected = made.run(*inputs)
    runtime.set["tf32"] = True
    with pytest.raises(IdmFastError, match=r"tf32 must be as when the graph was captured = False, got True"):
        made.run(*inputs)
    runtime.set["tf32"] = False
    assert torch.equal(made.run(*inputs), expected)
    runtime.set["tf32"] = True
    made.release_graphs()
    assert torch.equal(made.run(*inputs), expected)
    assert arena.graphs.captures == 2
    made.release_graphs()
    with pytest.raises(IdmFastError, match="load must come before step"):
        made.step(0)


def test_the_graph_not_used_for_longest_goes(arena: Arena, runtime: FakeRuntime) -> None:
    arena.graphs.limit = 1200  # the pool and two graphs
    engines = [_compile(arena, batch) for batch in (3, 2, 1)]
    expected = [_compile(batch=batch).run(*tiny_inputs(batch)) for batch in (3, 2, 1)]
    for which in (0, 1, 0, 2, 0, 1, 2):
        assert torch.equal(engines[which].run(*tiny_inputs(3 - which)), expected[which])
        assert runtime.alive <= 2
    assert arena.graphs.captures == 5  # 0, 1, 2 in the place of 1, then 1 and 2 anew
    arena.graphs.limit = 0  # the one in use stays
    assert torch.equal(engines[0].run(*tiny_inputs(3)), expected[0])
    assert torch.equal(engines[0].run(*tiny_inputs(3)), expected[0])
    assert runtime.alive == 1
    del engines
    gc.collect()
    assert arena.graphs.nbytes == runtime.alive == 0


def test_many_pictures_do_not_grow_it(arena: Arena, runtime: FakeRuntime) -> None:
    made, sizes = _compile(arena), set()
    for seed in range(6):
        made.run(*tiny_inputs(seed=seed))
        sizes.add(made.memory())
    assert len(sizes) == 1
    assert runtime.warm_ups == len(runtime.live) == 1


def test_memory_that_runs_out(arena: Arena, runtime: FakeRuntime) -> None:
    """Once: without the other graphs. Twice: a clear error, and the engine still works when there is some again."""
    first, second, inputs = _compile(arena, 2), _compile(arena), tiny_inputs()
    expected = _compile().run(*inputs)
    first.run(*tiny_inputs(2))
    runtime.exhausted = 1
    assert torch.equal(second.run(*inputs), expected)
    assert runtime.alive == 1
    second.release_graphs()
    first.run(*tiny_inputs(2))
    runtime.exhausted = 2
    with pytest.raises(OutOfMemory, match=r"must hold 1 images of 16 x 16, got: Tried to allocate 2.00 GiB, of which"):
        second.run(*inputs)
    assert torch.equal(second.run(*inputs), expected)


def test_what_the_host_reads_cannot_be_captured(arena: Arena, runtime: FakeRuntime) -> None:
    """An operation that waits for the device is an error and no wrong graph; the engine works without it."""
    made, inputs = _compile(arena), tiny_inputs()
    calls = made._plan._step
    calls.insert(0, lambda: made._tables.step.item())
    with pytest.raises(RuntimeError, match="not permitted when stream is capturing"):
        made.run(*inputs)
    calls.pop(0)
    assert torch.equal(made.run(*inputs), _compile().run(*inputs))


@pytest.mark.parametrize("shared", [True, False])
def test_two_engines_in_three_threads(runtime: FakeRuntime, shared: bool) -> None:
    arenas = [Arena(CPU, runtime)] * 2 if shared else [Arena(CPU, runtime), Arena(CPU, FakeRuntime())]
    engines = [_compile(each) for each in arenas]
    expected = [_compile().run(*tiny_inputs(seed=seed)) for seed in (5, 6)]
    wrong: list[object] = []

    def walk(index: int) -> None:
        try:
            for _ in range(4):
                if not torch.equal(engines[index].run(*tiny_inputs(seed=5 + index)), expected[index]):
                    wrong.append(index)
        except Exception as error:
            wrong.append(error)

    threads = [Thread(target=walk, args=(index,)) for index in (0, 1, 0)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_batches_go_in_buckets_of_one_pool(arena: Arena) -> None:
    assert [bucket(n) for n in (1, 2, 3, 4, 5, 8, 9)] == [1, 2, 4, 4, 8, 8, 16]
    config = ModelConfig("tiny", TINY, DiffusionConfig("cosine_continuous", "x0"), steps=2)
    plain, made = (CropRestorer(config, tiny_network(), CPU, "fp32", "torch") for _ in range(2))
    made._arena = arena
    for count in (4, 3, 1, 2, 3):
        _, seeds, y = tiny_inputs(count)
        expected = plain.restore(y, seeds, SampleSettings())
        assert (made.restore(y, seeds, SampleSettings()) - expected).abs().max() < 1e-5
    assert arena.graphs.captures == 3
    assert made.memory().graph_pool == 1000 + 3 * 100
