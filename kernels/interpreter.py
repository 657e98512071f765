"""Triton kernels run on the CPU under ``TRITON_INTERPRET=1`` only: a tool for tests, never the automatic choice."""

from __future__ import annotations

import os


def triton_condition(device_type: str, forced: bool) -> str | None:
    """Why Triton does not run on this kind of device, or None. Triton reads the variable when it decorates a kernel."""
    if device_type == "cuda":
        return None
    if os.environ.get("TRITON_INTERPRET") != "1":
        return "on a CPU it needs TRITON_INTERPRET=1, set before triton is imported"
    return None if forced else "on a CPU (interpreted) it runs only when forced"
