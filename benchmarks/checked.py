"""What may be timed: an operation's backends on a case, each after its result has been judged."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch

from idm_fast.bench.timing import Candidate
from idm_fast.kernels.case import Case, Inputs, verdict
from idm_fast.ops import BACKENDS, OPS, BackendError, suite, use_backend

CPU_ROTATED_BYTES = 32 * 2**20  # buffers that are used in turn, so that an input is not still in a cache
MAX_COPIES = 64
JUDGES = ("reference",)  # not competitors


@dataclass
class Timeable:
    """``candidates``: "eager" and each backend that runs the case and is right; ``refused``: the others, and why."""

    candidates: dict[str, Candidate] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)  # cannot run it
    wrong: dict[str, str] = field(default_factory=dict)  # runs, with a wrong result: never timed


def layers(names: list[str] | None = None) -> Iterator[tuple[str, Case]]:
    """Every real layer of the operations."""
    for name in names or OPS:
        for case in suite(name).cases:
            if case.layer:
                yield name, case


def timeable(
    name: str, case: Case, dtype: torch.dtype, device: str, backends: list[str] | None = None, *, warm: bool = False
) -> Timeable:
    """Judges every backend (by the rule of the tests) and prepares what is to be timed."""
    ops_suite, op = suite(name), OPS[name]
    found = Timeable()
    copies = 1 if warm else max(1, min(MAX_COPIES, _rotated_bytes(device) // max(1, case.bytes_moved(dtype))))
    inputs = [case.inputs(dtype, device, seed) for seed in range(copies)]
    exact, plain = _truth(name, inputs[0])
    for backend in [b for b in BACKENDS if b not in JUDGES] if backends is None else backends:
        row = op.backends.get(backend)
        if row is None:
            continue
        # `why_not` unforced: the interpreted Triton can run on a CPU, and nobody wants to know how long it takes.
        reason = row.why_not(torch.device(device), dtype)
        if reason is None:
            try:
                with use_backend(backend):
                    wrong = verdict(ops_suite.call(inputs[0]), exact, plain)
            except BackendError as error:
                reason = _of_backend(error, backend)
            except Exception as error:  # a kernel that does not compile or launch: the others are timed all the same
                wrong = f"{type(error).__name__}: {error}"[:500]
        if reason is not None:
            found.refused[backend] = reason
        elif wrong is not None:
            found.wrong[backend] = wrong
        else:
            found.candidates[backend] = _candidate(ops_suite.function, inputs, backend)
    found.candidates["eager"] = Candidate(lambda turn: ops_suite.eager(inputs[turn % copies]))
    return found


def _rotated_bytes(device: str) -> int:
    """On a device its second-level cache, twice over."""
    if not device.startswith("cuda"):
        return CPU_ROTATED_BYTES
    return 2 * int(torch.cuda.get_device_properties(device).L2_cache_size)


def _truth(name: str, inputs: Inputs) -> tuple[Any, Any]:
    with use_backend("torch"):
        return suite(name).exact(inputs), suite(name).call(inputs)


def _candidate(function: Any, inputs: list[Inputs], backend: str) -> Candidate:
    def setting() -> AbstractContextManager[None]:
        return use_backend(backend)

    return Candidate(lambda turn: function(**inputs[turn % len(inputs)]), setting)


def _of_backend(error: BackendError, backend: str) -> str:
    lines = [line.strip() for line in str(error).splitlines()]
    return next((line.partition(": ")[2] for line in lines if line.startswith(f"{backend}: ")), lines[0])
