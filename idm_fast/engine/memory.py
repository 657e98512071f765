"""How much memory there is, and the error that says there is too little."""

from __future__ import annotations

import torch

from idm_fast.errors import IdmFastError


class OutOfMemory(IdmFastError):
    """A plan needs more memory than the device has free; a smaller batch may fit."""


def available(device: torch.device) -> int | None:
    """Free bytes, those that torch keeps for later included; None where nobody says."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free) + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    try:
        with open("/proc/meminfo") as file:
            lines = dict(line.split(":", 1) for line in file)
        return int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError, IndexError):
        return None


def require(need: int, device: torch.device) -> None:
    """Raises ``OutOfMemory`` where ``need`` bytes are not free: asked before, since Linux promises what it lacks."""
    have = available(device)
    if have is not None and need > have:
        raise OutOfMemory(f"Engine: memory on {device} must hold the plan = {_mib(need)}, got {_mib(have)} free")


def exhausted(shape: tuple[int, int, int], error: torch.OutOfMemoryError) -> OutOfMemory:
    """What torch said when it gave out, of N images of H x W pixels: it names the need and what is free."""
    n, height, width = shape
    return OutOfMemory(f"Engine: memory must hold {n} images of {height} x {width}, got: {error}")


def _mib(size: int) -> str:
    return f"{size / 2**20:.0f} MiB"
