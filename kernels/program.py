"""``Program``: calls of native operations, recorded once and run without Python in between."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from idm_fast.kernels.extension import Bound, Prepared, require_native, view


class Program:
    """A list of native calls on fixed memory, for CPU tensors.

    Nothing is decided or allocated while it runs: what changes from run to run lies in the tensors, the step in a
    counter (``sampler_update``, ``bind_table_row``, ``bind_advance``). The contract is checked by the native code, at
    each run. One program must not run twice at once; two programs may, and so may anything else in Python.

    Raises ImportError where there is no native module.
    """

    def __init__(self) -> None:
        self._native = require_native().Program()
        self._calls: list[Bound] = []  # native code has addresses only: they keep alive what lies there

    def __len__(self) -> int:
        return len(self._calls)

    @property
    def names(self) -> list[str]:
        """The operations in the order in which they run."""
        names: list[str] = self._native.names
        return names

    def add(self, call: Bound) -> Any:
        """Appends a bound call (``OPS[name].bind``, ``bind_conv2d``, those below) and returns what it will have made.

        Its tensors must not move (``resize_``, ``set_``); what lies in them may change, but a weight given as a plain
        tensor has been packed: a later change of it is not seen, other than with ``PackedWeight.load``.
        Raises ValueError while the program runs.
        """
        getattr(self._native, call.function.__name__)(*call.prepared.arguments)
        self._calls.append(call)
        return call.prepared.result

    def record(self, op: str, *args: Any) -> Any:
        """``add`` of ``op(*args)`` on the cpu backend; ``args`` are those of the function in kernels/<op>/native.py.

        Raises ValueError for an operation without one or tensors of another device, TypeError for missing arguments.
        """
        for value in args:
            for tensor in value if isinstance(value, tuple) else (value,):
                if isinstance(tensor, Tensor) and tensor.device.type != "cpu":
                    raise ValueError(f"program: tensors of {op} must be on the device = cpu, got {tensor.device}")
        try:
            function = getattr(import_module(f"idm_fast.kernels.{op}.native"), op)
        except ModuleNotFoundError as error:
            raise ValueError(f"program: op must be an operation with a cpu backend, got {op!r}") from error
        return self.add(function.bind(*args))

    def run(self, repeats: int = 1) -> None:
        """Runs every call in order, ``repeats`` times, with torch's number of threads and without the GIL.

        Ctrl-C is noticed between repeats. Raises ValueError for a call outside its contract and RuntimeError for any
        other failure, both with the call's index and operation; calls before it have run.
        """
        self._native.run(repeats, torch.get_num_threads())


def joined(calls: Sequence[Callable[[], Any]]) -> list[Callable[[], Any]]:
    """The same calls with every row of neighbours that are ``Bound`` made one ``Program``'s ``run``."""
    found: list[Callable[[], Any]] = []
    program: Program | None = None
    for call in calls:
        if not isinstance(call, Bound):
            found.append(call)
            program = None
            continue
        if program is None:
            program = Program()
            found.append(program.run)
        program.add(call)
    return found


def bind_table_row(
    table: Tensor,  # [T, S] float32
    counter: Tensor,  # int64, one element
    out: Tensor,  # [S] or [N, S] float32
) -> Bound:
    """``out[...] = table[counter]`` on the CPU; a counter outside the table means the nearest row."""
    prepared = Prepared((view(table), view(counter.reshape(1)), view(out)), out)
    return Bound(require_native().table_row, prepared, (table, counter), threaded=False)


def bind_advance(
    counter: Tensor,  # int64, one element
    by: int = 1,
) -> Bound:
    """``counter += by`` on the CPU."""
    prepared = Prepared((view(counter.reshape(1)), by), counter)
    return Bound(require_native().advance, prepared, (counter,), threaded=False)
