"""Whole steps through pytest-benchmark: ``pytest benchmarks --benchmark-only -k steps [--benchmark-autosave]``.

Not part of the test run. ``idm-fast bench`` is the fairer clock (all take turns); this one compares with runs of before
(``--benchmark-compare``). The time is that of a walk of ``STEPS`` steps, waited for.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from idm_fast.bench import ours
from idm_fast.bench.peers import PEERS
from idm_fast.bench.workload import DTYPES, workload
from idm_fast.engine.precision import default_dtype

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
LOW = next(name for name, value in DTYPES.items() if value == default_dtype(DEVICE))
PRESETS = ("idm-128", "sr3-128")
STEPS = 2
Walk = Callable[[], Tensor]


def matrix() -> list[Any]:
    names = [("idm_fast", LOW), *([("idm_fast", "int8")] if DEVICE.type == "cpu" else [])]
    names += [
        (peer.name, dtype) for peer in PEERS if DEVICE.type in peer.dtypes for dtype in peer.runs_at([LOW], DEVICE)
    ]
    return [
        pytest.param(preset, name, dtype, id=f"steps-{preset}-{name}-{dtype}")
        for preset in PRESETS
        for name, dtype in names
    ]


@pytest.mark.parametrize(("preset", "name", "dtype"), matrix())
def test_walk(benchmark: Callable[[Callable[[], None]], None], preset: str, name: str, dtype: str) -> None:
    with torch.no_grad():
        walk = _walk(preset, name, dtype)
        assert bool(torch.isfinite(walk()).all())

        def call() -> None:
            walk()
            if DEVICE.type == "cuda":
                torch.cuda.synchronize()

        benchmark(call)


def _walk(preset: str, name: str, dtype: str) -> Walk:
    work = workload(preset, steps=STEPS, device=DEVICE)
    if name == "idm_fast":
        made = ours.engine(work, dtype)
        return lambda: ours.run(made, work)
    (peer,) = [peer for peer in PEERS if peer.name == name]
    reason = peer.why_not(DEVICE)
    if reason is not None:
        pytest.skip(f"{name}: {reason}")
    built = peer.build(work, dtype, torch.get_num_threads())
    return lambda: work.run(built.denoise, built.network_dtype)
