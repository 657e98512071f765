"""The same layers through pytest-benchmark: ``pytest benchmarks --benchmark-only [-k idm128] [--benchmark-autosave]``.

Not part of the test run. benchmarks/ops.py is the fairer clock (candidates take turns); this one compares with runs of
before (``--benchmark-compare``). On a CUDA device the time is that of launching and waiting.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import count
from typing import Any

import pytest
import torch
from checked import JUDGES, layers, timeable

from idm_fast.kernels.case import Case
from idm_fast.ops import BACKENDS, OPS

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = torch.float16 if DEVICE == "cuda" else torch.bfloat16


def matrix() -> list[Any]:
    names = [name for name in BACKENDS if name not in JUDGES]
    return [
        pytest.param(op, case, backend, id=f"{op}-{case.name}-{backend}")
        for op, case in layers()
        for backend in [*names, "eager"]
        if backend == "eager" or backend in OPS[op].backends
    ]


@pytest.mark.parametrize(("op", "case", "backend"), matrix())
def test_layer(benchmark: Callable[[Callable[[], None]], None], op: str, case: Case, backend: str) -> None:
    found = timeable(op, case, DTYPE, DEVICE, [] if backend == "eager" else [backend])
    if backend in found.refused:
        pytest.skip(f"{backend}: {found.refused[backend]}")
    assert not found.wrong, f"wrong, so it is not timed: {found.wrong}"
    candidate, turns = found.candidates[backend], count()

    def call() -> None:
        candidate.call(next(turns))
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    with torch.no_grad(), candidate.setting():
        benchmark(call)
