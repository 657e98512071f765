"""Times every operation x layer x backend, after checking it: ``python benchmarks/ops.py [--json FILE]``.

Backends are interleaved call by call in one process; each row is the median with the 20th and 80th percentile, GB/s
counted from the least possible traffic, the fraction of this machine's copy bandwidth, and how many times faster than
the same thing in plain torch (``eager``). Inputs rotate through copies that overflow the L2 cache unless ``--warm``.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

from idm_fast.kernels import extension
from idm_fast.kernels.case import Case, Suite, verdict
from idm_fast.ops import BACKENDS, OPS, BackendError, suite, use_backend

ROTATED_BYTES = 32 * 2**20
MAX_COPIES = 64
SKIPPED = ("reference",)  # a judge, not a competitor


def synchronise(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def interleaved(calls: dict[str, Callable[[int], Any]], device: str, seconds: float) -> dict[str, list[float]]:
    """Seconds per call, each name in turn until the budget of all is spent; at least 5 calls each after two."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    begin, turn = time.perf_counter(), 0
    while turn < 7 or (time.perf_counter() - begin < seconds and turn < 2000):
        for name, call in calls.items():
            synchronise(device)
            start = time.perf_counter()
            call(turn)
            synchronise(device)
            if turn >= 2:
                times[name].append(time.perf_counter() - start)
        turn += 1
    return times


def copy_bandwidth(device: str) -> float:
    """Bytes read and written per second by one large copy."""
    source = torch.ones(128 * 2**20, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    times = interleaved({"copy": lambda _: target.copy_(source)}, device, 0.5)["copy"]
    return 2 * source.nbytes / statistics.median(times)


def check(ops_suite: Suite, case: Case, dtype: torch.dtype, device: str, backend: str) -> None:
    """Raises SystemExit for a wrong result (it is not worth timing) and BackendError where the backend cannot run."""
    inputs = case.inputs(dtype, device)
    with use_backend(backend):
        out = ops_suite.call(inputs)
    with use_backend("torch"):
        wrong = verdict(out, ops_suite.exact(inputs), ops_suite.call(inputs))
    if wrong is not None:
        raise SystemExit(f"{case.name} on {backend} in {dtype} is wrong, so it is not timed: {wrong}")


def measure(
    name: str, case: Case, dtype: torch.dtype, args: argparse.Namespace, bandwidth: float
) -> list[dict[str, Any]]:
    ops_suite, op = suite(name), OPS[name]
    moved = case.bytes_moved(dtype)
    copies = 1 if args.warm else max(1, min(MAX_COPIES, ROTATED_BYTES // moved))
    inputs = [case.inputs(dtype, args.device, seed) for seed in range(copies)]
    calls: dict[str, Callable[[int], Any]] = {"eager": lambda turn: ops_suite.eager(inputs[turn % copies])}
    for backend in args.backends:
        automatic = op.backends.get(backend)
        if automatic is None or automatic.why_not(torch.device(args.device), dtype) is not None:
            continue
        try:
            check(ops_suite, case, dtype, args.device, backend)
        except BackendError:
            continue  # refused by its limits

        def call(turn: int, backend: str = backend) -> None:
            with use_backend(backend):
                ops_suite.function(**inputs[turn % copies])

        calls[backend] = call
    rows = []
    with torch.no_grad():
        times = interleaved(calls, args.device, args.seconds)
    eager = statistics.median(times["eager"])
    for backend, values in times.items():
        p20, median, p80 = (statistics.quantiles(values, n=10)[k] for k in (1, 4, 7))
        rows.append(
            {
                "op": name,
                "case": case.name,
                "layer": case.why,
                "dtype": str(dtype).removeprefix("torch."),
                "backend": backend,
                "median_us": median * 1e6,
                "p20_us": p20 * 1e6,
                "p80_us": p80 * 1e6,
                "gb_per_s": moved / median / 1e9,
                "of_copy": moved / median / bandwidth,
                "times_eager": eager / median,
            }
        )
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--op", choices=OPS, action="append", help="only this operation (may be repeated)")
    parser.add_argument("--backends", nargs="+", choices=BACKENDS, default=[b for b in BACKENDS if b not in SKIPPED])
    parser.add_argument(
        "--dtypes", nargs="+", default=["bfloat16", "float32"], choices=["float32", "bfloat16", "float16"]
    )
    parser.add_argument("--seconds", type=float, default=1.0, help="budget of one case, all backends together")
    parser.add_argument("--warm", action="store_true", help="one set of buffers: everything stays in the caches")
    parser.add_argument("--json", metavar="FILE", help="also write the rows there ('-': to standard output, alone)")
    args = parser.parse_args()

    bandwidth = copy_bandwidth(args.device)
    shown = sys.stderr if args.json == "-" else sys.stdout
    print(f"copy bandwidth {bandwidth / 1e9:.1f} GB/s, {torch.get_num_threads()} threads", file=shown)
    rows: list[dict[str, Any]] = []
    for name in args.op or OPS:
        for case in suite(name).cases:
            for dtype in args.dtypes if case.layer else []:
                found = measure(name, case, getattr(torch, dtype), args, bandwidth)
                rows += found
                for row in found:
                    print(
                        f"{row['op']:<16} {row['case']:<16} {row['dtype']:<9} {row['backend']:<8}"
                        f"{row['median_us']:10.1f} us ({row['p20_us']:.1f} .. {row['p80_us']:.1f})"
                        f"{row['gb_per_s']:8.1f} GB/s {row['of_copy']:6.0%} of copy {row['times_eager']:6.2f}x eager",
                        file=shown,
                    )
    if args.json:
        text = json.dumps({"machine": machine(args), "copy_gb_per_s": bandwidth / 1e9, "rows": rows}, indent=2)
        if args.json == "-":
            print(text)
        else:
            with open(args.json, "w", encoding="utf-8") as file:
                file.write(text + "\n")
    return 0


def machine(args: argparse.Namespace) -> dict[str, Any]:
    return {
        "device": torch.cuda.get_device_name() if args.device == "cuda" else platform.processor() or platform.machine(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
        "cpu_isa": extension.native.cpu_isa() if extension.native else None,
        "buffers": "warm" if args.warm else "rotating",
    }


if __name__ == "__main__":
    raise SystemExit(main())
