"""What Triton kernels can run. On a CPU that is nothing but under ``TRITON_INTERPRET=1``, a tool for tests."""

from __future__ import annotations

import os

from torch import Tensor

MOST_SAMPLES = 65535  # blocks along any axis of a grid but the first


def triton_condition(device_type: str, forced: bool) -> str | None:
    """Why Triton does not run on this kind of device, or None. Triton reads the variable when it decorates a kernel."""
    if device_type == "cuda":
        return None
    if os.environ.get("TRITON_INTERPRET") != "1":
        return "on a CPU it needs TRITON_INTERPRET=1, set before triton is imported"
    return None if forced else "on a CPU (interpreted) it runs only when forced"


def second_axis(x: Tensor, *_: object) -> str | None:
    """The ``limits`` of kernels whose grid counts samples along its second axis; ``x`` [N, ...]."""
    return samples_reason(x.shape[0])


def samples_reason(samples: int) -> str | None:
    return None if samples <= MOST_SAMPLES else f"takes at most {MOST_SAMPLES} samples, not {samples}"
