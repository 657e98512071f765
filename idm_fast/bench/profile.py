"""One step taken apart: every call of the engine's plan, or every module of a plain network, with its own roof.

The calls run in their order, evaluation after evaluation, with a clock between them, so that each finds the caches as
it does in a walk. What the clocks themselves and Python cost shows as the difference to the whole step.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from idm_fast.bench import ours
from idm_fast.bench.plain import PlainAttention, PlainNorm, plain
from idm_fast.bench.roofline import Ceilings
from idm_fast.bench.work import Layer
from idm_fast.bench.workload import DTYPES, Workload
from idm_fast.engine import Engine
from idm_fast.engine.nodes import Node


@dataclass(frozen=True)
class Call:
    """One line of the table; times in seconds. ``compute``: the dtype of its products."""

    layer: str
    op: str
    backend: str
    seconds: float
    flops: int
    weight_bytes: int
    activation_bytes: int
    compute: torch.dtype
    launches: int = 1

    @property
    def bytes(self) -> int:
        return self.weight_bytes + self.activation_bytes

    def roof(self, ceilings: Ceilings) -> tuple[float, str]:
        """(T_roof, what sets it)."""
        terms = {
            "compute": self.flops / ceilings.flops_per_s[self.compute],
            "weights": self.weight_bytes / ceilings.bytes_per_s,
            "activations": self.activation_bytes / max(ceilings.bytes_per_s, ceilings.cached_bytes_per_s or 0.0),
        }
        bound = max(terms, key=lambda name: terms[name])
        return terms[bound], bound

    def as_json(self, ceilings: Ceilings) -> dict[str, Any]:
        roof, bound = self.roof(ceilings)
        return {
            "layer": self.layer, "op": self.op, "backend": self.backend, "us": 1e6 * self.seconds,
            "flops": self.flops, "bytes": self.bytes, "launches": self.launches, "roofline_us": 1e6 * roof,
            "roofline_fraction": roof / self.seconds, "bound": bound,
        }  # fmt: skip


@dataclass(frozen=True)
class Profile:
    """``step``: seconds of a whole step without clocks inside, from whole walks."""

    calls: tuple[Call, ...]
    step: float
    what: str  # "engine" or "plain torch modules"

    @property
    def launches(self) -> int:
        return sum(call.launches for call in self.calls)

    @property
    def between(self) -> float:
        """Share of the step that no call accounts for: below 0 where the clocks cost more than Python does."""
        return 1 - sum(call.seconds for call in self.calls) / self.step


@contextmanager
def marked(name: str, device: torch.device) -> Iterator[None]:
    """A range that Nsight shows (CUDA), and torch.profiler."""
    with torch.profiler.record_function(name):
        if device.type != "cuda":
            yield
            return
        torch.cuda.nvtx.range_push(name)  # type: ignore[no-untyped-call]
        try:
            yield
        finally:
            torch.cuda.nvtx.range_pop()  # type: ignore[no-untyped-call]


class Clock:
    """Time points on a device, read all at once: ``tick`` between the calls, then ``laps``."""

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        self.points: list[Any] = []

    def tick(self) -> None:
        if not self.cuda:
            self.points.append(time.perf_counter())
            return
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        self.points.append(event)

    def laps(self) -> list[float]:
        """Seconds between the points."""
        pairs = zip(self.points, self.points[1:], strict=False)
        if not self.cuda:
            return [after - before for before, after in pairs]
        self.points[-1].synchronize()
        return [before.elapsed_time(after) / 1e3 for before, after in pairs]


@torch.no_grad()
def of_engine(engine: Engine, workload: Workload, repeats: int) -> Profile:
    """Medians over ``repeats`` evaluations."""
    nodes = engine.nodes
    laps: list[list[float]] = []
    for _ in range(repeats + 1):
        engine.load(workload.start, workload.seeds, workload.cond)
        clock = Clock(workload.device)

        def around(node: Node, call: Callable[[], object], clock: Clock = clock) -> None:
            clock.tick()
            with marked(f"{node.layer} {node.op}", workload.device):
                call()

        engine.visit(around)
        clock.tick()
        laps.append(clock.laps())
    medians = [statistics.median(values) for values in zip(*laps[1:], strict=True)]
    dtype = engine.weights.dtype
    calls = tuple(
        Call(
            node.layer, node.op, node.backend, seconds, node.flops, node.weight_bytes, node.activation_bytes,
            DTYPES[tier] if (tier := getattr(node, "quantised", None)) else dtype,
        )
        for node, seconds in zip(nodes, medians, strict=True)
    )  # fmt: skip
    return Profile(calls, _step(lambda: ours.run(engine, workload), workload, repeats), "engine")


@torch.no_grad()
def of_modules(workload: Workload, dtype: str, repeats: int) -> Profile:
    """Plain torch, module by module: what eager spends, under the names of our layers."""
    network = plain(workload.module(DTYPES[dtype]))
    x, t = workload.start.to(DTYPES[dtype]), workload.table.times(workload.batch, workload.device)[0]
    work = {layer.name.removesuffix(".attend"): layer for layer in workload.layers}
    timed: dict[str, list[float]] = {}
    moved: dict[str, tuple[str, int, int]] = {}
    for name, module in _leaves(network):
        _time_module(name, module, workload.device, timed, moved)
    for _ in range(repeats + 1):
        network(x, t, workload.cond)
    calls = tuple(
        _module_call(name, *moved[name], statistics.median(laps[1:]), work.get(name), DTYPES[dtype])
        for name, laps in timed.items()
    )
    whole = plain(workload.module(DTYPES[dtype]))
    denoise = _Denoise(whole, workload)
    step = _step(lambda: workload.run(denoise, DTYPES[dtype]), workload, repeats)
    return Profile(calls, step, "plain torch modules")


class _Denoise:
    def __init__(self, network: nn.Module, workload: Workload) -> None:
        self.network, self.workload = network, workload

    def __call__(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return self.workload.image_channels(self.network(x, t, self.workload.cond))


def _leaves(network: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for name, module in network.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear | PlainNorm | PlainAttention):
            yield name.removeprefix("model."), module


def _time_module(
    name: str, module: nn.Module, device: torch.device, timed: dict[str, list[float]], moved: dict[str, Any]
) -> None:
    """Hooks that note how long each call took."""
    clocks: list[Clock] = []

    def before(_: nn.Module, args: tuple[Any, ...]) -> None:
        clocks.append(Clock(device))
        clocks[-1].tick()

    def after(m: nn.Module, args: tuple[Any, ...], out: torch.Tensor) -> None:
        clock = clocks.pop()
        clock.tick()
        (lap,) = clock.laps()
        if isinstance(m, PlainAttention):  # its parts have lines of their own
            lap -= sum(timed[f"{name}.{part}"][-1] for part in ("norm", "qkv", "out"))
        timed.setdefault(name, []).append(lap)
        weights = sum(p.numel() * p.element_size() for p in m.parameters(recurse=False))
        moved[name] = (_kind(m), weights, args[0].nbytes + out.nbytes)

    module.register_forward_pre_hook(before)
    module.register_forward_hook(after)


def _kind(module: nn.Module) -> str:
    if isinstance(module, nn.Conv2d):
        return "conv{}x{}".format(*module.kernel_size)
    return {nn.Linear: "linear", PlainNorm: "norm"}.get(type(module), "attention")


def _module_call(
    name: str, op: str, weights: int, activations: int, seconds: float, work: Layer | None, dtype: torch.dtype
) -> Call:
    return Call(name, op, "torch", seconds, work.flops if work else 0, weights, activations, dtype)


def _step(walk: Callable[[], Any], workload: Workload, repeats: int) -> float:
    """Median seconds of a step in whole walks."""
    taken = []
    for _ in range(max(3, repeats // 2) + 1):
        if workload.device.type == "cuda":
            torch.cuda.synchronize(workload.device)
        began = time.perf_counter()
        walk()
        if workload.device.type == "cuda":
            torch.cuda.synchronize(workload.device)
        taken.append(time.perf_counter() - began)
    return statistics.median(taken[1:]) / workload.steps


def by_op(calls: Sequence[Call]) -> dict[tuple[str, str], list[Call]]:
    """Grouped by (operation, backend), the longest first."""
    groups: dict[tuple[str, str], list[Call]] = {}
    for call in calls:
        groups.setdefault((call.op, call.backend), []).append(call)
    return dict(sorted(groups.items(), key=lambda item: -sum(call.seconds for call in item[1])))
