"""The CUDA kernels of every operation, run on the CPU (csrc/common/cuda_on_cpu), against float64.

The same Python sides and the same kernels as on a device, by the same rule as tests/test_ops.py; small cases only.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest
import torch

from idm_fast.kernels import extension
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
        for case in suite(name).cases
        if small(case)
        for dtype in suite(name).dtypes
    ]


@pytest.fixture(scope="module")
def emulated(emulator: ModuleType) -> Iterator[ModuleType]:
    """Every operation's CUDA row runs on the CPU: a copy of its Python side that got the emulator for ``_C``."""
    extension.cuda_stand_in = emulator
    try:
        with ExitStack() as stack:
            for name in CUDA_OPS:
                row = OPS[name].backends["cuda"]
                module, _, function = row.function.partition(":")
                copy = f"{module}_on_cpu"
                spec = importlib.util.find_spec(module)
                assert spec is not None
                assert spec.origin is not None
                copy_spec = importlib.util.spec_from_file_location(copy, spec.origin)
                assert copy_spec is not None
                assert copy_spec.loader is not None
                sys.modules[copy] = importlib.util.module_from_spec(copy_spec)
                stack.callback(sys.modules.pop, copy)
                copy_spec.loader.exec_module(sys.modules[copy])
                there = replace(row, function=f"{copy}:{function}", devices=frozenset({"cpu"}))
                stack.enter_context(OPS[name].substituted(there))
            extension.cuda_stand_in = None
            yield emulator
    finally:
        extension.cuda_stand_in = None


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
