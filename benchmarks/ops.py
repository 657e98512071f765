"""Times every operation x real layer x backend, after judging it: ``python benchmarks/ops.py [--json FILE]``.

Each row: median with the 20th and 80th percentile, GB/s counted from the least possible traffic, TFLOP/s, the roofline
fraction (T_roof / median, limits measured in the same run) and how many times faster than the same thing in plain torch
(``eager``). Candidates take turns call by call; inputs rotate through copies that overflow the L2 cache unless --warm.
A backend whose result is wrong, or which raises, is not timed, and the exit status says so. The report is written anew
after each layer, so that a run that is cut off keeps what it had.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from checked import JUDGES, layers, timeable

from idm_fast.bench.machine import machine
from idm_fast.bench.roofline import Ceilings, measure
from idm_fast.bench.timing import interleaved
from idm_fast.files import atomic
from idm_fast.kernels.case import Case
from idm_fast.ops import BACKENDS, OPS

DTYPES = ("float32", "bfloat16", "float16")


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--op", choices=OPS, action="append", help="only this operation (may be repeated)")
    parser.add_argument("--case", action="append", help="only layers whose name or description holds this text")
    parser.add_argument("--backends", nargs="+", choices=BACKENDS, default=[b for b in BACKENDS if b not in JUDGES])
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"], choices=DTYPES)
    parser.add_argument("--seconds", type=float, default=1.0, help="budget of one layer, all backends together")
    parser.add_argument("--total-seconds", type=float, help="no layer is begun after this time; the rest is listed")
    parser.add_argument("--warm", action="store_true", help="one set of buffers: everything stays in the caches")
    parser.add_argument("--json", metavar="FILE", help="also write the rows there ('-': to standard output, alone)")
    return parser.parse_args(arguments)


def rows_of(
    name: str, case: Case, dtype: torch.dtype, args: argparse.Namespace, ceilings: Ceilings
) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """(a row a candidate, backend -> what is wrong with its result)."""
    found = timeable(name, case, dtype, args.device, args.backends, warm=args.warm)
    with torch.no_grad():
        spreads = interleaved(found.candidates, args.device, args.seconds)
    moved = case.bytes_moved(dtype)
    roof, bound = ceilings.seconds(case.flops, moved, dtype)
    rows = [
        {
            "op": name,
            "case": case.name,
            "layer": case.why,
            "dtype": str(dtype).removeprefix("torch."),
            "backend": backend,
            "median_us": spread.median * 1e6,
            "p20_us": spread.p20 * 1e6,
            "p80_us": spread.p80 * 1e6,
            "calls": spread.calls,
            "gb_per_s": moved / spread.median / 1e9,
            "tflop_per_s": case.flops / spread.median / 1e12,
            "roof_us": roof * 1e6,
            "bound": bound,
            "of_roof": roof / spread.median,
            "times_eager": spreads["eager"].median / spread.median,
        }
        for backend, spread in spreads.items()
    ]
    return rows, found.wrong


def as_text(row: dict[str, Any]) -> str:
    return (
        f"{row['op']:<18}{row['case']:<18}{row['dtype']:<9}{row['backend']:<9}"
        f"{row['median_us']:10.1f} us ({row['p20_us']:.1f} .. {row['p80_us']:.1f})"
        f"{row['gb_per_s']:8.1f} GB/s{row['tflop_per_s']:8.3f} TFLOP/s"
        f"{row['of_roof']:6.0%} of {row['bound']} roof{row['times_eager']:7.2f}x eager"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    args = parse(arguments)
    begin = time.perf_counter()
    shown = sys.stderr if args.json == "-" else sys.stdout
    dtypes = [getattr(torch, name) for name in args.dtypes]
    ceilings = measure(args.device, dtypes)
    said = ", ".join(f"{k} {v:.3f}" for k, v in ceilings.as_json()["product_tflop_per_s"].items())
    print(f"copy {ceilings.bytes_per_s / 1e9:.1f} GB/s, product {said} TFLOP/s", file=shown)
    rows: list[dict[str, Any]] = []
    wrong: list[dict[str, str]] = []
    left_out: list[str] = []
    buffers = {"buffers": "warm" if args.warm else "rotating"}
    about = {"machine": machine(args.device) | buffers, "ceilings": ceilings.as_json()}

    def report() -> str:
        return json.dumps({**about, "rows": rows, "wrong": wrong, "not_timed": left_out}, indent=2)

    def save() -> None:
        if args.json and args.json != "-":
            with atomic(Path(args.json)) as temporary:
                temporary.write_text(report() + "\n")

    for name, case in layers(args.op):
        if args.case and not any(text in f"{case.name} {case.why}" for text in args.case):
            continue
        for dtype in dtypes:
            title = f"{name} {case.name} {str(dtype).removeprefix('torch.')}"
            if args.total_seconds is not None and time.perf_counter() - begin > args.total_seconds:
                left_out.append(title)
                continue
            found, faults = rows_of(name, case, dtype, args, ceilings)
            rows += found
            wrong += [{"what": title, "backend": backend, "wrong": fault} for backend, fault in faults.items()]
            for row in found:
                print(as_text(row), file=shown, flush=True)
            for backend, fault in faults.items():
                print(f"{title} {backend}: wrong, so it is not timed: {fault}", file=sys.stderr)
            save()
    save()
    if left_out:
        print(f"out of time: {len(left_out)} not begun", file=sys.stderr)
    if args.json == "-":
        print(report())
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
