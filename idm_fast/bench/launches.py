"""How many pieces one evaluation is made of: kernels on CUDA, operators that do work on a CPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class _Counting(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts what torch dispatches, views and allocations left out."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count: int = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not func.is_view and "empty" not in func.name():
            self.count += 1
        return func(*args, **(kwargs or {}))


def launches(call: Callable[[], Any], device: torch.device) -> int | None:
    """Of one ``call``; None where CUDA's profiler is not there."""
    if device.type != "cuda":
        with _Counting() as counting:
            call()
        return int(counting.count)
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        call()
        torch.cuda.synchronize(device)
    kernels = [e for e in profiler.events() or () if str(e.device_type).endswith("CUDA") and "Mem" not in e.name]
    return len(kernels) or None
