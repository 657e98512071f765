"""What figures depend on: device, versions, commit, threads, load; and the memory that is in use."""

from __future__ import annotations

import ctypes
import gc
import os
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from idm_fast.evaluation.environment import environment
from idm_fast.kernels import extension

LIBRARIES = ("triton", "xformers", "diffusers", "openvino", "onnxruntime")


def machine(device: torch.device | str) -> dict[str, Any]:
    """For the head of a results file."""
    device = torch.device(device)
    found = environment(device)
    for name in LIBRARIES:
        with suppress(metadata.PackageNotFoundError):
            found["versions"][name] = metadata.version(name)
    if device.type == "cuda":
        found["versions"] |= {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}  # type: ignore[no-untyped-call]
        with suppress(OSError):
            found["driver"] = Path("/proc/driver/nvidia/version").read_text().splitlines()[0]
    found["cpu_isa"] = extension.native.cpu_isa() if extension.native else None
    with suppress(AttributeError):  # not on every system
        found["cores"] = len(os.sched_getaffinity(0))
    found["load_average"] = os.getloadavg()[0]
    return found


def used_bytes(device: torch.device) -> int | None:
    """Memory in use now: of the device, or what of this process is resident. None where the system does not say."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
        free, total = torch.cuda.mem_get_info(device)
        return total - free
    with suppress(OSError, AttributeError):  # what was freed goes back first, where this C library can do that
        ctypes.CDLL(None).malloc_trim(0)
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return None
