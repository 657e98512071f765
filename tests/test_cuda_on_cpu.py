"""The CUDA kernels of every operation, run on the CPU (csrc/common/cuda_on_cpu), against float64.

The same Python sides and the same kernels as on a device, by the same rule as tests/test_ops.py; small cases only.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from types import ModuleType
from typing import Any

import pytest
import torch

from idm_fast.kernels.case import Case, verdict
from idm_fast.ops import OPS, BackendError, suite, use_backend

# The emulator runs some millions of a thread's steps a second: larger cases would take minutes.
EMULATED_BYTES = 200_000
EMULATED_FLOPS = 20_000_000

CUDA_OPS = [name for name in OPS if "cuda" in OPS[name].backends]


def small(case: Case) -> bool:
    return case.bytes_moved(torch.float32) <= EMULATED_BYTES and case.flops <= EMULATED_FLOPS


def matrix() -> list[Any]:
    return [
        pytest.param(name, case, dtype, id=f"{name}-{case.name}-{str(dtype).removeprefix('torch.')}")
        for name in CUDA_OPS
        for case in suite(name).tested
        if small(case)
        for dtype in suite(name).dtypes
    ]


@pytest.fixture(scope="module")
def emulated(emulator: ModuleType, emulated_rows: Callable[[ModuleType], AbstractContextManager[None]]) -> Any:
    with emulated_rows(emulator):
        yield emulator


@pytest.mark.parametrize(("name", "case", "dtype"), matrix())
def test_matches_float64(emulated: Any, name: str, case: Case, dtype: torch.dtype) -> None:
    inputs = case.inputs(dtype)
    results = []
    try:
        # Blocks and threads in order and in the opposite one: what differs has a race.
        for reverse in (False, True):
            emulated.set_reversed(reverse)
            with use_backend("cuda"):
                results.append(suite(name).call(inputs))
    except BackendError:
        reason = OPS[name].why_not("cuda", "cpu", dtype) or "refused by its limits"
        pytest.skip(f"cuda: {reason}")
    finally:
        emulated.set_reversed(False)
    with use_backend("torch"):
        wrong = verdict(results[0], suite(name).exact(inputs), suite(name).call(inputs))
    assert wrong is None, f"{case.name} ({case.why}): {wrong}"
    for key, value in results[0].items():
        assert torch.equal(value, results[1][key]), f"{key}: the opposite order of blocks and threads differs"
