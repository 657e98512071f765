"""``Program``: calls of native operations, recorded once and run without Python in between."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from idm_fast.kernels.extension import Prepared, require_native, view


class Program:
    """A list of native calls on fixed memory, for CPU tensors.

    Nothing is decided or allocated while it runs: what changes from run to run lies in the tensors, the step in a
    counter (``sampler_update``, ``table_row``, ``advance``). The contract is checked by the native code, at each run.
    One program must not run twice at once; two programs may, and so may anything else in Python.

    Raises ImportError where there is no native module.
    """

    def __init__(self) -> None:
        self._native = require_native().Program()
        self._keep: list[object] = []  # native code has addresses only

    def __len__(self) -> int:
        return len(self._native)

    @property
    def names(self) -> list[str]:
        """The operations in the order in which they run."""
        names: list[str] = self._native.names
        return names

    def record(self, op: str, *args: Any) -> Any:
        """Appends ``op(*args)`` and returns its result, which is written when the program runs.

        ``args``: those of the implementation in kernels/<op>/native.py, all of them. Tensors are kept alive here and
        must not move (``resize_``, ``set_``); what lies in them may change. A weight given as a plain tensor is packed
        now, so that a later change of it is not seen. Raises TypeError or ValueError for arguments that cannot be one.
        """
        for value in args:
            _on_cpu(op, value)
        call = _prepare(op, args)
        getattr(self._native, op)(*call.arguments)
        self._keep.append((args, call.result, call.keep))
        return call.result

    def table_row(
        self,
        table: Tensor,  # [T, S] float32
        counter: Tensor,  # int64, one element
        out: Tensor,  # [S] or [N, S] float32
    ) -> None:
        """Appends ``out[...] = table[counter]``; a counter outside the table means the nearest row."""
        _on_cpu("table_row", (table, counter, out))
        self._native.table_row(view(table), view(counter.reshape(1)), view(out))
        self._keep.append((table, counter, out))

    def advance(
        self,
        counter: Tensor,  # int64, one element
        by: int = 1,
    ) -> None:
        """Appends ``counter += by``."""
        _on_cpu("advance", counter)
        self._native.advance(view(counter.reshape(1)), by)
        self._keep.append(counter)

    def run(self, repeats: int = 1) -> None:
        """Runs every call in order, ``repeats`` times, with torch's number of threads and without the GIL.

        Ctrl-C is noticed between repeats. Raises ValueError for a call outside its contract and RuntimeError for any
        other failure, both with the call's index and operation; calls before it have run.
        """
        self._native.run(repeats, torch.get_num_threads())


def _on_cpu(op: str, value: object) -> None:
    for tensor in value if isinstance(value, tuple) else (value,):
        if isinstance(tensor, Tensor) and tensor.device.type != "cpu":
            raise ValueError(f"program: tensors of {op} must be on the device = cpu, got {tensor.device}")


def _prepare(op: str, args: tuple[Any, ...]) -> Prepared:
    try:
        module = import_module(f"idm_fast.kernels.{op}.native")
    except ModuleNotFoundError as error:
        raise ValueError(f"program: op must be an operation with a cpu backend, got {op!r}") from error
    call: Prepared = module.prepare(*args)
    return call
