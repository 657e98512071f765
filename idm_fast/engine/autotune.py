"""Which backend runs each call: measured on this machine, kept in a file that no other machine uses."""

from __future__ import annotations

import json
import os
import platform
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

import idm_fast
from idm_fast.errors import IdmFastError
from idm_fast.files import atomic
from idm_fast.kernels import dispatch
from idm_fast.kernels.channel_stats import ChannelStats
from idm_fast.kernels.extension import native
from idm_fast.ops import OPS

Policy = Literal["off", "cached", "on"]
JUDGES = ("reference",)  # never candidates: they are there to be right
ROUNDS, WARM_SECONDS = 7, 0.01


class Autotuner:
    """``policy``: "off" takes the first backend of the table, "cached" what the file says or else the first, "on"
    measures what the file lacks and writes it there. ``path``: the file; None: in the user's cache folder.

    Raises ``IdmFastError`` for an unknown policy. A file of another machine, or a broken one, is not used: a warning.
    """

    def __init__(self, policy: Policy = "cached", path: Path | None = None) -> None:
        if policy not in get_args(Policy):
            raise IdmFastError(f"autotune must be one of {', '.join(get_args(Policy))}, got {policy!r}")
        self.policy, self.path = policy, path or default_path()
        self.measured = 0
        self._choices = {} if policy == "off" else _read(self.path)

    def choose(self, op: str, device: torch.device, dtype: torch.dtype, arguments: tuple[Any, ...]) -> str | None:
        """The backend for a call, or None: the first of the table that can run it."""
        if self.policy == "off":
            return None
        arguments = _without_room(arguments)
        candidates = _candidates(op, device, dtype, arguments)
        if len(candidates) < 2:
            return None
        key = signature(op, device, arguments)
        known = self._choices.get(key)
        if known not in candidates:
            if self.policy == "cached":
                return None
            known = fastest(op, device, candidates, arguments)
            self._choices[key] = known
            self.measured += 1
        return known

    def save(self) -> None:
        """Writes what was measured, together with what others have written since."""
        if not self.measured:
            return
        self._choices = _read(self.path) | self._choices
        try:
            with atomic(self.path) as path:
                path.write_text(json.dumps({"machine": machine(), "choices": self._choices}, indent=1, sort_keys=True))
        except IdmFastError as error:
            warnings.warn(f"autotune: {self.path} must be writable, got {error}", RuntimeWarning, stacklevel=2)


def default_path() -> Path:
    try:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError:  # a user without a home, as in some containers
        cache = Path(tempfile.gettempdir())
    return cache / "idm_fast" / "autotune.json"


@cache
def machine() -> dict[str, str]:
    """What a choice depends on, and must be the same for it to hold."""
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "cpu": _cpu_name(), "cpus": str(os.cpu_count()), "isa": native.cpu_isa() if native is not None else "none",
        "gpus": ", ".join(devices), "torch": torch.__version__, "cuda": str(torch.version.cuda),
        "idm_fast": idm_fast.__version__,
    }  # fmt: skip


def signature(op: str, device: torch.device, arguments: Iterable[Any]) -> str:
    """Shapes, types and settings of a call, and the number of threads on a CPU."""
    threads = f" x{torch.get_num_threads()}" if device.type == "cpu" else ""
    return f"{op} {device.type}{threads}: " + " ".join(map(_told, arguments))


def fastest(op: str, device: torch.device, candidates: list[str], arguments: tuple[Any, ...]) -> str:
    """By the median of interleaved rounds; the calls write the buffers that they will write anyway."""
    rows = OPS[op].backends
    calls = {name: dispatch.bound(rows[name].run, *arguments) for name in candidates}
    repeats = {}
    for name, call in calls.items():
        call()
        took = max(_timed(call, 1, device), 1e-7)
        repeats[name] = max(1, min(1000, int(WARM_SECONDS / took)))
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(ROUNDS):
        for name, call in calls.items():
            times[name].append(_timed(call, repeats[name], device) / repeats[name])
    return min(times, key=lambda name: statistics.median(times[name]))


def _candidates(op: str, device: torch.device, dtype: torch.dtype, arguments: tuple[Any, ...]) -> list[str]:
    """Backends that can run the call and are allowed to, in the order of the table."""
    forced = dispatch.forced_backends()
    found = []
    for name, row in OPS[op].backends.items():
        if name in JUDGES or (forced and name not in forced):
            continue
        able = row.why_not(device, dtype, forced=bool(forced)) is None
        if able and (row.limits is None or row.limits(*arguments) is None):
            found.append(name)
    return found


def _without_room(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """Each backend cuts statistics in its own way: for a trial it makes room itself."""
    last = arguments[-1]
    return (*arguments[:-1], None) if isinstance(last, ChannelStats) else arguments


def _timed(call: Callable[[], object], repeats: int, device: torch.device) -> float:
    if device.type == "cuda":
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        begin.record()
        for _ in range(repeats):
            call()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) / 1000
    began = time.perf_counter()
    for _ in range(repeats):
        call()
    return time.perf_counter() - began


def _told(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}".replace(" ", "")
    if isinstance(value, tuple):
        return "stats"
    return str(value)


def _read(path: Path) -> dict[str, str]:
    try:
        found = json.loads(path.read_text())
        theirs, choices = dict(found["machine"]), dict(found["choices"])
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError) as error:
        said = f"autotune: {path} must be a cache of choices, got {error!r}; it is not used"
        warnings.warn(said, RuntimeWarning, stacklevel=3)
        return {}
    if theirs != machine():
        wrong = sorted(key for key in {*theirs, *machine()} if theirs.get(key) != machine().get(key))
        said = "; ".join(f"{key} = {machine().get(key)}, got {theirs.get(key)}" for key in wrong)
        warnings.warn(f"autotune: {path} must be of this machine: {said}; it is not used", RuntimeWarning, stacklevel=3)
        return {}
    return {str(key): str(value) for key, value in choices.items()}


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            return next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
