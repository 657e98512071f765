"""Which backend runs an operation.

A backend declares facts; ``Op`` holds the table of an operation's backends, fastest first. The automatic choice walks
down the table and takes the first that can run. A forced choice (``use_backend`` or the environment variable
``IDM_FAST_BACKEND``: one name, or several in order of preference, "cpu,torch") is taken or an error: it never falls
back to a backend that was not named.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache, partial
from importlib import import_module
from typing import Any

import torch

BACKENDS = ("triton", "cuda", "cpu", "xformers", "torch", "reference")
MOST_PREPARED = 512  # kinds of calls that an operation remembers
NOT_WRITTEN = "not written for this operation"

FLOATS = frozenset({torch.float32, torch.bfloat16, torch.float16})
ANY_FLOAT = FLOATS | {torch.float64}


# What is left of a table when device, dtype and a forced choice are known: (limits, implementation) pairs to try.
Plan = list[tuple[Callable[..., str | None] | None, Callable[..., Any]]]


class BackendError(RuntimeError):
    """No backend, or not the one that was asked for, can run this call. The message lists each with its reason."""


@dataclass(frozen=True)
class Backend:
    """One implementation of an operation: facts that can be asked; the code is imported when it is first needed."""

    name: str
    function: str  # "module:function"; an ImportError of the module means "not available", nothing else does
    devices: frozenset[str]  # device types that it runs on
    dtypes: frozenset[torch.dtype]
    min_capability: tuple[int, int] | None = None  # CUDA compute capability
    limits: Callable[..., str | None] | None = None  # same arguments as the implementation -> why not this call
    condition: Callable[[str, bool], str | None] | None = None  # (device type, forced) -> why not

    def why_not(self, device: torch.device, dtype: torch.dtype, *, forced: bool = False) -> str | None:
        """Why this backend cannot run on (device, dtype), or None. ``limits`` may still refuse a shape or layout."""
        if device.type not in self.devices:
            return f"runs on {_list(self.devices)}, not on {device.type}"
        if dtype not in self.dtypes:
            return f"takes {_list(str(d).removeprefix('torch.') for d in self.dtypes)}, not {_dtype(dtype)}"
        if device.type == "cuda" and not torch.cuda.is_available():
            return "needs a CUDA device, and torch sees none"
        if self.condition is not None and (reason := self.condition(device.type, forced)) is not None:
            return reason
        if self.min_capability is not None and device.type == "cuda":
            actual = torch.cuda.get_device_capability(device)
            if actual < self.min_capability:
                return f"needs compute capability {self.min_capability}, this device has {actual}"
        try:
            self.run  # noqa: B018
        except ImportError as error:
            return str(error)
        return None

    @property
    def run(self) -> Callable[..., Any]:
        """The implementation. Raises ImportError where it is not available."""
        return _load(self.function)


class Op:
    """An operation and the table of its backends."""

    def __init__(self, name: str, formula: str, backends: list[Backend]) -> None:
        names = [backend.name for backend in backends]
        assert names == [name for name in BACKENDS if name in names], "rows come in the order of BACKENDS"
        self.name = name
        self.formula = formula
        self.backends = {backend.name: backend for backend in backends}
        self._plans: dict[tuple[torch.device, torch.dtype, tuple[str, ...]], Plan] = {}
        self._last: tuple[torch.device, torch.dtype, tuple[str, ...], Plan] | None = None
        self._prepared: dict[tuple[object, ...], Callable[..., Any]] = {}

    def __repr__(self) -> str:
        return f"Op({self.name!r}, {list(self.backends)})"

    def run(self, device: torch.device, dtype: torch.dtype, *args: Any) -> Any:
        """Runs the chosen backend on ``args``. Raises ``BackendError`` when none of the allowed ones can."""
        return self.choose(device, dtype, *args)(*args)

    def bind(self, device: torch.device, dtype: torch.dtype, *args: Any) -> Callable[[], Any]:
        """The call that ``run`` would make, with everything decided and, where the backend can, prepared beforehand."""
        return bound(self.choose(device, dtype, *args), *args)

    def pieces(self, device: torch.device, dtype: torch.dtype, *args: Any) -> int:
        """Into how many pieces the backend that ``run`` would call cuts the statistics that it makes."""
        return pieces(self.choose(device, dtype, *args), *args)

    def choose(self, device: torch.device, dtype: torch.dtype, *args: Any) -> Callable[..., Any]:
        """The implementation that ``run`` would call. Raises ``BackendError`` when none of the allowed ones can."""
        forced = forced_backends()
        last = self._last  # the same layer kind as before, mostly: comparing is cheaper than hashing
        if last is not None and dtype is last[1] and device == last[0] and forced == last[2]:
            plan = last[3]
        else:
            found = self._plans.get((device, dtype, forced))
            plan = self._plan(device, dtype, forced) if found is None else found
            self._last = (device, dtype, forced, plan)
        for limits, run in plan:
            if limits is None or limits(*args) is None:
                return run
        raise BackendError(self._explain(device, dtype, forced, args))

    def prepared(self, key: tuple[object, ...]) -> Callable[..., Any] | None:
        """What ``remember`` was told of calls that look alike."""
        return self._prepared.get(key)

    def remember(self, key: tuple[object, ...], call: Callable[..., Any]) -> None:
        """``call`` serves all calls with this key: they keep the contract, and who runs them is known.

        For operations that take less time than their checks. The key must hold ``forced_backends()``.
        """
        if len(self._prepared) >= MOST_PREPARED:
            self._prepared.clear()
        self._prepared[key] = call

    def why_not(self, backend: str, device: torch.device | str, dtype: torch.dtype, *args: Any) -> str | None:
        """Why the named backend cannot run, or None. With ``args`` (those of ``run``) also its limits are asked."""
        row = self.backends.get(_known(backend))
        if row is None:
            return NOT_WRITTEN
        reason = row.why_not(torch.device(device), dtype, forced=True)
        if reason is None and args and row.limits is not None:
            reason = row.limits(*args)
        return reason

    def table(self, device: torch.device | str, dtype: torch.dtype) -> dict[str, str | None]:
        """Every backend name -> None where it can run, else the reason."""
        return {name: self.why_not(name, device, dtype) for name in BACKENDS}

    def automatic(self, device: torch.device | str, dtype: torch.dtype) -> str | None:
        """Name of the backend that runs when none is forced and no limit refuses the call."""
        place = torch.device(device)
        return next((n for n, row in self.backends.items() if row.why_not(place, dtype) is None), None)

    @contextmanager
    def substituted(self, row: Backend) -> Iterator[None]:
        """Puts ``row`` in the place of the row of its name inside the block. For tests; not safe between threads."""
        before = self.backends[row.name]
        self.backends[row.name] = row
        self._forget()
        try:
            yield
        finally:
            self.backends[row.name] = before
            self._forget()

    def _forget(self) -> None:
        self._plans.clear()
        self._prepared.clear()
        self._last = None

    def _plan(self, device: torch.device, dtype: torch.dtype, forced: tuple[str, ...]) -> Plan:
        rows = [self.backends[name] for name in forced or self.backends if name in self.backends]
        plan = [(row.limits, row.run) for row in rows if row.why_not(device, dtype, forced=bool(forced)) is None]
        self._plans[device, dtype, forced] = plan
        return plan

    def _explain(self, device: torch.device, dtype: torch.dtype, forced: tuple[str, ...], args: tuple[Any, ...]) -> str:
        asked = f"forced backend {','.join(forced)!r}" if forced else "no backend"
        lines = [f"{self.name}: {asked} can{'not' if forced else ''} run this call on {device} in {_dtype(dtype)}:"]
        for name in BACKENDS:
            reason = self.why_not(name, device, dtype, *args)
            lines.append(f"  {name}: {reason or 'yes'}")
        return "\n".join(lines)


def bound(run: Callable[..., Any], *args: Any) -> Callable[[], Any]:
    """``run(*args)`` for many times: prepared, where the implementation ``run`` has a ``bind`` of its own."""
    prepare: Callable[..., Callable[[], Any]] | None = getattr(run, "bind", None)
    return partial(run, *args) if prepare is None else prepare(*args)


def pieces(run: Callable[..., Any], *args: Any) -> int:
    """Of the statistics that ``run(*args)`` makes; an implementation without ``pieces`` makes them in one."""
    asked: Callable[..., int] | None = getattr(run, "pieces", None)
    return 1 if asked is None else asked(*args)


_forced: ContextVar[tuple[str, ...] | None] = ContextVar("idm_fast_backend", default=None)


@contextmanager
def use_backend(name: str | None) -> Iterator[None]:
    """Forces a backend, or several in order of preference ("cpu,torch"), inside the block and this thread or task.

    ``None`` gives the automatic choice back, whatever ``IDM_FAST_BACKEND`` says. Raises ``BackendError`` for a name
    that no table knows.
    """
    token = _forced.set(() if name is None else _parse(name))
    try:
        yield
    finally:
        _forced.reset(token)


def forced_backends() -> tuple[str, ...]:
    """The names forced here, in order of preference; empty: the automatic choice."""
    names = _forced.get()
    return _from_environment() if names is None else names


@cache
def _from_environment() -> tuple[str, ...]:
    """Read at the first call: asking the environment takes longer than all the rest of the choice."""
    value = os.environ.get("IDM_FAST_BACKEND")
    return _parse(value) if value else ()


@cache
def _parse(value: str) -> tuple[str, ...]:
    return tuple(_known(name.strip()) for name in value.split(","))


def _known(name: str) -> str:
    if name not in BACKENDS:
        raise BackendError(f"backend must be one of = {', '.join(BACKENDS)}, got {name!r}")
    return name


@cache
def _load(function: str) -> Callable[..., Any]:
    module, _, name = function.partition(":")
    loaded: Callable[..., Any] = getattr(import_module(module), name)
    return loaded  # an ImportError is not cached


def _list(names: Any) -> str:
    return ", ".join(sorted(names))


def _dtype(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
