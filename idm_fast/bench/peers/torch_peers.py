"""torch itself: eager, compiled, and eager with xformers' attention. Channels-last, in the asked dtype."""

from __future__ import annotations

import os
from collections.abc import Callable
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

from idm_fast.bench.launches import launches
from idm_fast.bench.peers import Built
from idm_fast.bench.plain import Attend, plain, sdpa, xformers_attention
from idm_fast.bench.workload import DTYPES, Workload


def eager(workload: Workload, dtype: str, threads: int, attend: Attend = sdpa) -> Built:
    return built(workload, dtype, plain(workload.module(DTYPES[dtype]), attend))


def with_xformers(workload: Workload, dtype: str, threads: int) -> Built:
    """Eager, with memory_efficient_attention in the place of torch's."""
    return eager(workload, dtype, threads, xformers_attention)


def compiled(workload: Workload, dtype: str, threads: int) -> Built:
    """CUDA: max-autotune, which captures CUDA graphs. CPU: with freezing, which packs weights beforehand.

    Compiled here, before any timing. A run that was killed leaves half a library in torch's cache, which then fails to
    load at each later one: once more then, in a cache of its own.
    """
    try:
        return _compiled(workload, dtype)
    except Exception as error:
        if "ImportError" not in str(error):
            raise
        torch.compiler.reset()
        # What is loaded stays loaded when its file goes.
        with TemporaryDirectory() as folder, patch.dict(os.environ, TORCHINDUCTOR_CACHE_DIR=folder):
            return _compiled(workload, dtype)


def _compiled(workload: Workload, dtype: str) -> Built:
    network = plain(workload.module(DTYPES[dtype]))
    if workload.device.type == "cuda":
        made = torch.compile(network, mode="max-autotune", fullgraph=True, dynamic=False)
        return built(workload, dtype, made, before=torch.compiler.cudagraph_mark_step_begin, note="max-autotune")
    made = torch.compile(network, fullgraph=True, dynamic=False, options={"freezing": True})
    return built(workload, dtype, made, note="freezing", counted=False)


def built(
    workload: Workload,
    dtype: str,
    network: Callable[..., Tensor] | nn.Module,
    *,
    before: Callable[[], Any] = lambda: None,
    note: str = "",
    counted: bool = True,
) -> Built:
    """A torch network in the walk, after one call that builds what is built at the first."""

    def denoise(x: Tensor, t: Tensor) -> Tensor:
        before()
        out: Tensor = network(x, t, workload.cond)
        return workload.image_channels(out)

    x = workload.start.to(DTYPES[dtype])
    t = workload.table.times(workload.batch, workload.device)[0]
    with torch.no_grad():
        denoise(x, t)
        found = launches(lambda: denoise(x, t), workload.device) if counted else None
    return Built(denoise, DTYPES[dtype], found, note)
