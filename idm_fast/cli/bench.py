"""idm-fast bench: steps a second, against whom you like, in one process."""

from __future__ import annotations

import argparse
import json
import math
import sys
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import torch

from idm_fast.bench import roofline
from idm_fast.bench.machine import machine
from idm_fast.bench.peers import PEERS
from idm_fast.bench.rows import OURS, Asked, check_peers, measure
from idm_fast.bench.text import table
from idm_fast.bench.workload import DTYPES, check, names, workload
from idm_fast.cli.checks import check_backend, check_threads
from idm_fast.engine.lossy import REUSE_COST
from idm_fast.engine.precision import chosen_dtype
from idm_fast.errors import IdmFastError
from idm_fast.files import atomic
from idm_fast.registry import Target

_DESCRIPTION = """Times whole walks from noise to picture and divides by their steps: the median with the 20th and 80th
percentile, wall clock. All take turns walk by walk in one process, so that a busy machine disturbs all of them alike:
compare rows of one table only. Every row has the same weights and noise (diffusers: its own weights); PSNR compares
its pictures with plain torch's in float32. A result of ours that is wrong is not timed. Our walks compute all that
depends on the picture; what the steps' times alone give is kept from walk to walk, where others compute it each time.

"of roof" is T_roof / measured, with T_roof the sum over layers of max(FLOPs / P, weight bytes / B, activation bytes /
B_cache); P is a big product of the dtype, B a big copy and B_cache a small one, measured first. It counts the network
as its family defines it, so that doing less than that can pass 100 %."""
_EPILOG = """memory is what the process (CPU) or device (CUDA) held more after building and one walk; rough on a
CPU, where what others gave back is used again. launches are kernels (CUDA), or operators (CPU; of ours the engine's
calls). A peer that is not installed, or fails, is named with its reason.

exit code: 0 all good, 1 ours failed somewhere, 2 wrong usage.

examples:
  idm-fast bench                                              idm-128 on this machine
  idm-fast bench --preset sr3-128 --dtype bf16 int8 --peers --json out.json
  idm-fast bench --peers eager openvino --threads 2           pip install "idm_fast[peers]" brings those of a CPU
  idm-fast bench --batch 1 2 4 8 --json out.json              how the cost grows; also --size and --steps
  python benchmarks/report.py out.json                        tables and pictures of it (in a checkout)
"""
# What --peers can name, in a line.
_PEERS = ", ".join(peer.name for peer in PEERS)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description, parser.epilog = _DESCRIPTION, _EPILOG
    p = parser.add_argument_group("workload", "each may take several values; every combination is timed")
    p.add_argument(
        "--preset", nargs="+", default=["idm-128"], metavar="NAME",
        help=f"{', '.join(names())}, or a .safetensors file; presets without shipped weights get random ones "
        "(default: idm-128)",
    )  # fmt: skip
    p.add_argument("--batch", nargs="+", type=int, default=[1], metavar="N", help="pictures at once (default: 1)")
    p.add_argument("--size", nargs="+", type=int, metavar="PX", help="side in pixels (default: the preset's)")
    p.add_argument("--steps", nargs="+", type=int, default=[4], metavar="T", help="of a walk (default: 4)")
    p.add_argument(
        "--dtype", nargs="+", choices=DTYPES, help="ours, and the peers' where they have it; int8 (CPU) and fp8 "
        "(sm_90) are lossy and ours only (default: the fastest sound one of the device)",
    )  # fmt: skip
    p.add_argument(
        "--cache-every", type=int, default=1, metavar="K",
        help=f"of ours, lossy above 1: levels below the finest at every K-th step only ({REUSE_COST})",
    )  # fmt: skip
    p = parser.add_argument_group("against")
    p.add_argument("--peers", nargs="*", metavar="PEER", help=f"{_PEERS}; without names: all (default: none)")
    p = parser.add_argument_group("machine")
    p.add_argument("--device", help="cpu, cuda or cuda:N (default: cuda if there is one)")
    p.add_argument("--threads", type=int, help="CPU threads of all of them (default: torch's)")
    p.add_argument("--backend", metavar="NAME[,NAME]", help="force kernel back ends of ours (see idm-fast ops)")
    p = parser.add_argument_group("timing")
    p.add_argument("--seconds", type=float, default=5.0, help="of a table, all rows together (default: %(default)s)")
    p.add_argument("--walks", type=int, default=5, help="at least, of each row (default: %(default)s)")
    p.add_argument("--json", type=Path, metavar="FILE", help="write the results there ('-': to standard output, alone)")


def run(args: argparse.Namespace) -> int:
    asked = _asked(args)
    device, default = Target(args.device).resolved()
    asked = replace(asked, dtypes=asked.dtypes or [_name(default)])
    _check_dtypes(asked, device, args.backend)
    torch.set_num_threads(asked.threads)
    alone = str(args.json) == "-"
    combinations = list(product(args.preset, args.size or [None], args.batch, args.steps))
    for preset, size, batch, steps in combinations:  # a wrong one ends the run here, before any time is spent
        check(preset, batch=batch, size=size, steps=steps, cache_every=asked.cache_every)

    kinds = [DTYPES[name] for name in dict.fromkeys([*asked.dtypes, _name(default), "fp32"])]
    ceilings = roofline.measure(str(device), kinds, cached=True)
    report: dict[str, Any] = {"machine": machine(device), "ceilings": ceilings.as_json(), "rows": [], "absent": []}
    for preset, size, batch, steps in combinations:
        work = workload(preset, batch=batch, size=size, steps=steps, device=device)
        found = measure(work, asked, ceilings, lambda text: print(f"idm-fast: {text}", file=sys.stderr))
        report["rows"] += found.rows
        report["absent"] += found.absent
        if not alone and found.rows:
            print(table(found.rows), end="\n\n", flush=True)
        for each in found.absent:
            who = f"{each['name']} {each['dtype']}".rstrip()
            print(f"idm-fast: not timed: {who}: {each['reason']}", file=sys.stderr)
        _write(report, args.json)
    if alone:
        print(json.dumps(report, indent=1))
    return 1 if any(each["name"] == OURS for each in report["absent"]) else 0


def _write(report: dict[str, Any], target: Path | None) -> None:
    """After each table, so that a run that is stopped has written what it found."""
    if target is not None and str(target) != "-":
        with atomic(target) as path:
            path.write_text(json.dumps(report, indent=1) + "\n")


def _asked(args: argparse.Namespace) -> Asked:
    threads = torch.get_num_threads() if args.threads is None else args.threads
    check_threads(threads)
    if args.walks < 2:
        raise IdmFastError(f"--walks must be >= 2, got {args.walks}")
    if not 0 <= args.seconds < math.inf:
        raise IdmFastError(f"--seconds must be >= 0 and finite, got {args.seconds}")
    check_backend(args.backend)
    if args.json is not None and args.json.is_dir():
        raise IdmFastError(f"--json must be a file, got the folder {args.json}")
    peers = [] if args.peers is None else check_peers(args.peers)
    dtypes = list(dict.fromkeys(args.dtype or []))
    return Asked(dtypes, peers, args.seconds, args.walks, threads=threads, backend=args.backend,
                 cache_every=args.cache_every)  # fmt: skip


def _check_dtypes(asked: Asked, device: torch.device, backend: str | None) -> None:
    for name in asked.dtypes:
        try:
            chosen_dtype(name, device, backend)
        except IdmFastError as error:
            raise IdmFastError(f"--dtype: {error}") from None


def _name(dtype: torch.dtype | str) -> str:
    return dtype if isinstance(dtype, str) else next(name for name, value in DTYPES.items() if value == dtype)
