"""Runs the small cases of every operation through modules built with sanitizers: a script of test_sanitizers.py.

``python sanitized.py cpu _C.so`` or ``python sanitized.py cuda _E.so``. Ends with "clean: N calls"; a sanitizer ends
the process at its first finding.
"""

from __future__ import annotations

import sys
from contextlib import nullcontext
from pathlib import Path

import torch
from conftest import cuda_rows_on_cpu, load

BYTES, FLOPS = 200_000, 4_000_000  # a sanitized kernel is several times slower, an emulated one much more


def main(backend: str, path: Path) -> None:
    if backend == "cpu":
        load("idm_fast._C", path)  # before the package looks for its own
    from idm_fast.kernels import extension
    from idm_fast.ops import OPS, BackendError, suite, use_backend

    emulator = load("_E", path) if backend == "cuda" else None
    assert extension.native is not None
    assert emulator is not None or Path(str(extension.native.__file__)) == path
    isas = extension.native.cpu_isas() if backend == "cpu" else [""]
    torch.set_num_threads(2)
    calls = 0
    with nullcontext() if emulator is None else cuda_rows_on_cpu(emulator):
        for name, op in OPS.items():
            if backend not in op.backends:
                continue
            for case in suite(name).tested:
                if case.bytes_moved(torch.float32) > BYTES or case.flops > FLOPS:
                    continue
                for dtype in suite(name).dtypes:
                    inputs = case.inputs(dtype)
                    for isa in isas:
                        extension.native.set_cpu_isa(isa)
                        print(f"{name} {case.name} {dtype} {isa}", flush=True)
                        try:
                            with use_backend(backend):
                                suite(name).call(inputs)
                                calls += 1
                        except BackendError:
                            continue  # refused by its limits
    if backend == "cpu":
        run_program()
    print(f"clean: {calls} calls")


def run_program() -> None:
    """A recorded step: its arguments must outlive the tuples that they came from, and its threads may change."""
    from idm_fast.kernels.program import Program, bind_advance, bind_table_row

    print("program", flush=True)
    x = torch.randn(1, 3, 6, 8).contiguous(memory_format=torch.channels_last)
    history, stem = torch.zeros_like(x), torch.empty(1, 3, 4, 12).permute(0, 3, 1, 2)
    table, counter, row = torch.ones(3, 8), torch.zeros(1, dtype=torch.int64), torch.empty(2, 8)
    program = Program()
    program.add(bind_table_row(table, counter, row))
    program.record("sampler_update", x, x + 1, history, table, counter, torch.tensor([7]), stem, None, 2, x + 2)
    program.add(bind_advance(counter))
    for threads in (1, 2):
        torch.set_num_threads(threads)
        program.run(2)
    assert counter.item() == 4
    assert x.isfinite().all()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
