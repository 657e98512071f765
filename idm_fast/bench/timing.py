"""Fair times: candidates take turns call by call, so that what disturbs the machine disturbs all of them.

On a CUDA device each call is timed by a pair of events behind a short sleep of the device: by the time it wakes, the
launches are queued, and the time is the device's alone. On a CPU, or with ``wall``, it is wall clock, waited for.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

WARM_UP = 2
LEAST, MOST = 5, 2000  # timed calls of a candidate, whatever the budget
SLEEP_CYCLES = 800_000  # 0.4 ms at 2 GHz: longer than the host takes to queue several Triton launches


@dataclass(frozen=True)
class Candidate:
    """``call(turn)`` is timed; ``setting`` is entered before and left after it, outside of the time."""

    call: Callable[[int], Any]
    setting: Callable[[], AbstractContextManager[Any]] = nullcontext


@dataclass(frozen=True)
class Spread:
    """Seconds a call."""

    median: float
    p20: float
    p80: float
    calls: int
    best: float = 0.0

    @staticmethod
    def of(seconds: list[float]) -> Spread:
        tenths = statistics.quantiles(seconds, n=10)
        return Spread(tenths[4], tenths[1], tenths[7], len(seconds), min(seconds))


def interleaved(
    candidates: Mapping[str, Candidate],
    device: str,
    seconds: float,
    *,
    least: int = LEAST,
    warm_up: int = WARM_UP,
    wall: bool = False,
    pause: float = 0.0,
) -> dict[str, Spread]:
    """Each candidate in turn until ``seconds`` of all are spent; at least ``least`` >= 2 calls each after the warm-up.

    ``pause``: idle seconds before each call. The threads of one library spin for some milliseconds after its last
    work, and would take the cores of the next.
    """
    times: dict[str, list[float]] = {name: [] for name in candidates}
    begin, turn = time.perf_counter(), 0
    while turn < warm_up + least or (time.perf_counter() - begin < seconds and turn < warm_up + MOST):
        for name, candidate in candidates.items():
            time.sleep(pause)
            with candidate.setting():
                taken = _timed(candidate.call, turn, device, wall)
            if turn >= warm_up:
                times[name].append(taken)
        turn += 1
    return {name: Spread.of(values) for name, values in times.items()}


def _timed(call: Callable[[int], Any], turn: int, device: str, wall: bool) -> float:
    cuda = device.startswith("cuda")
    if wall or not cuda:
        if cuda:
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        call(turn)
        if cuda:
            torch.cuda.synchronize(device)
        return time.perf_counter() - start
    before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    torch.cuda._sleep(SLEEP_CYCLES)  # type: ignore[no-untyped-call]
    before.record()
    call(turn)
    after.record()
    after.synchronize()
    return float(before.elapsed_time(after)) / 1e3
