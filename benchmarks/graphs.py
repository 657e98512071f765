"""Walks as CUDA graphs against the same calls one by one: equal bit for bit, how long, how much memory.

``python benchmarks/graphs.py --preset sr3-128 idm-128 --batch 1 16 --steps 4 50 [--json FILE]``. A row a combination;
JSON is written after each. What is not equal is not timed, and ends the run with 1. On a CPU, which has no graphs, both
are the same calls.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from idm_fast.bench import ours, roofline
from idm_fast.bench.machine import machine
from idm_fast.bench.text import markdown, number
from idm_fast.bench.timing import Candidate, interleaved
from idm_fast.bench.workload import DTYPES, Workload, workload
from idm_fast.errors import IdmFastError
from idm_fast.files import atomic
from idm_fast.registry import Target

HEAD = ("preset", "dtype", "batch", "steps", "launches", "equal", "calls ms", "graph ms", "of roof", "first s", "MiB")


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", nargs="+", default=["sr3-128"], help="see idm-fast bench --help")
    parser.add_argument("--batch", nargs="+", type=int, default=[1])
    parser.add_argument("--size", type=int, help="side in pixels (default: the preset's)")
    parser.add_argument("--steps", nargs="+", type=int, default=[4])
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, help="default: the fastest sound one of the device")
    parser.add_argument("--device", help="cpu, cuda or cuda:N (default: cuda if there is one)")
    parser.add_argument("--seconds", type=float, default=2.0, help="of a row (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="results file to write")
    return parser.parse_args(arguments)


@torch.no_grad()
def row(work: Workload, dtype: str, ceilings: roofline.Ceilings, seconds: float) -> dict[str, Any]:
    """``first_s``: compile, warm up, capture and run once; the graph's engine is built second, with warm compilers."""
    runs, firsts, results = {}, {}, {}
    found: dict[str, Any] = {"preset": work.preset, "dtype": dtype, "batch": work.batch, "steps": work.steps}
    for name, graph in (("calls", False), ("graph", True)):
        began = time.perf_counter()
        made = ours.engine(work, dtype, graph=graph)
        results[name] = _settled(ours.run(made, work))
        firsts[name] = time.perf_counter() - began
        runs[name] = made
    again = _settled(ours.run(runs["graph"], work))
    equal = torch.equal(results["calls"], results["graph"]) and torch.equal(again, results["graph"])
    found |= {
        "launches": runs["graph"].launches, "equal": equal, "finite": bool(torch.isfinite(again).all()),
        "captures": runs["graph"].arena.graphs.captures, "memory": asdict(runs["graph"].memory()),
        "first_s": firsts,
    }  # fmt: skip
    if not equal:
        found["largest_difference"] = float((results["calls"] - results["graph"]).abs().max())
        return found
    spreads = interleaved(
        {name: Candidate(lambda _, made=made: ours.run(made, work)) for name, made in runs.items()},  # type: ignore[misc]
        str(work.device), seconds, wall=True,
    )  # fmt: skip
    roof = ceilings.network(work.layers, DTYPES[dtype])
    for name, spread in spreads.items():
        step = spread.median / work.steps
        found[name] = {"ms_per_step": 1e3 * step, "p20_ms": 1e3 * spread.p20 / work.steps,
                       "p80_ms": 1e3 * spread.p80 / work.steps, "roofline_fraction": roof / step}  # fmt: skip
    return found


def _settled(result: Tensor) -> Tensor:
    if result.is_cuda:
        torch.cuda.synchronize(result.device)
    return result


def table(rows: Sequence[dict[str, Any]]) -> str:
    lines = []
    for each in rows:
        timed = "graph" in each
        lines.append(
            [
                each["preset"], each["dtype"], str(each["batch"]), str(each["steps"]), str(each["launches"]),
                "yes" if each["equal"] else f"no, {each['largest_difference']:.3g}",
                number(each["calls"]["ms_per_step"] if timed else None),
                number(each["graph"]["ms_per_step"] if timed else None),
                f"{each['graph']['roofline_fraction']:.0%}" if timed else "-", number(each["first_s"]["graph"], 1),
                number(sum(each["memory"].values()) / 2**20, 0),
            ]
        )  # fmt: skip
    return markdown(HEAD, lines)


def main(arguments: Sequence[str] | None = None) -> int:
    args = parse(arguments)
    try:
        device, default = Target(args.device).resolved()
        names = args.dtype or [next(name for name, value in DTYPES.items() if value == default)]
        ceilings = roofline.measure(str(device), [DTYPES[name] for name in names], cached=True)
        report: dict[str, Any] = {"machine": machine(device), "ceilings": ceilings.as_json(), "rows": []}
        for preset, batch, steps, dtype in product(args.preset, args.batch, args.steps, names):
            work = workload(preset, batch=batch, size=args.size, steps=steps, device=device)
            report["rows"].append(row(work, dtype, ceilings, args.seconds))
            print(table(report["rows"][-1:]), end="\n\n", flush=True)
            if args.json:
                with atomic(args.json) as path:
                    path.write_text(json.dumps(report, indent=1) + "\n")
    except IdmFastError as error:
        print(f"graphs: {error}", file=sys.stderr)
        return 2
    wrong = [each for each in report["rows"] if not (each["equal"] and each["finite"])]
    print(f"{len(report['rows']) - len(wrong)} of {len(report['rows'])} equal bit for bit")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
