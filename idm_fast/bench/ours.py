"""idm_fast itself: the engine, and the same operations called from plain modules without it."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from idm_fast.bench.peers import Built
from idm_fast.bench.workload import DTYPES, Workload
from idm_fast.engine import Engine, EngineOptions
from idm_fast.kernels import use_backend


def engine(workload: Workload, dtype: str, backend: str | None = None, **options: Any) -> Engine:
    """The compiled plan of a workload. ``dtype``: fp32, bf16, fp16, int8 or fp8; ``backend``: kernels to prefer;
    ``options``: more of ``EngineOptions``."""
    height, width = workload.size
    return Engine.compile(
        workload.model, (workload.batch, height, width), workload.table, dtype=dtype, device=workload.device,
        options=EngineOptions(backend=backend, **options),
    )  # fmt: skip


def run(made: Engine, workload: Workload) -> Tensor:
    """One whole walk, as ``Workload.run``."""
    return workload.picture(made.run(workload.start, workload.seeds, workload.cond))


def modules(workload: Workload, dtype: str, threads: int, backend: str | None = None) -> Built:
    """``engine=False``: torch's convolutions, our norms, attention and update, all called from Python."""
    module = workload.module(DTYPES[dtype])

    def forced() -> AbstractContextManager[None]:
        return nullcontext() if backend is None else use_backend(backend)

    def denoise(x: Tensor, t: Tensor) -> Tensor:
        with forced():
            return workload.image_channels(module(x, t, workload.cond))

    with torch.no_grad():
        denoise(workload.start.to(DTYPES[dtype]), workload.table.times(workload.batch, workload.device)[0])
    return Built(denoise, DTYPES[dtype], None, "engine off")
