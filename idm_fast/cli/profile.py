"""idm-fast profile: where the time of a step goes."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from idm_fast.bench import ours, roofline
from idm_fast.bench.machine import machine
from idm_fast.bench.profile import of_engine, of_modules
from idm_fast.bench.profile_files import call_table, op_table, write_json, write_roofline, write_trace
from idm_fast.bench.workload import DTYPES, names, workload
from idm_fast.cli.checks import check_backend, check_threads
from idm_fast.engine.lossy import TIERS
from idm_fast.engine.precision import chosen_dtype
from idm_fast.errors import IdmFastError
from idm_fast.registry import Target

_DESCRIPTION = """Runs the engine's calls one after the other with a clock between them and prints, for each and for
each operation: time, FLOPs, bytes (read once, written once) and how near it comes to its own limit, which is
max(FLOPs / P, weight bytes / B, activation bytes / B_cache) with P, B and B_cache measured first."""
_EPILOG = """It writes to the folder --out:
  profile.json    everything above, and the machine
  trace.json      the calls in order, for ui.perfetto.dev or chrome://tracing
  torch.json      what torch.profiler sees of a whole walk: on CUDA every kernel; the same viewers
  roofline.png    FLOP/s over FLOPs per byte, with the machine's limits

examples:
  idm-fast profile                              idm-128 on this machine, into profile/
  idm-fast profile --preset sr3-128 --dtype bf16 --all
  idm-fast profile --no-engine                  the same network as plain torch modules, to compare
"""
_NSIGHT = """On a CUDA machine Nsight sees the same ranges (layer and operation) through NVTX:
  nsys profile -t cuda,nvtx -o {out}/nsys {command}
  ncu --nvtx --set full --launch-count 200 -o {out}/ncu {command}
  ncu --nvtx --nvtx-include "{layer}/" --set full -o {out}/layer {command}     one layer"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description, parser.epilog = _DESCRIPTION, _EPILOG
    parser.add_argument(
        "--preset", default="idm-128", metavar="NAME",
        help=f"{', '.join(names())}, or a .safetensors file (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--batch", type=int, default=1, help="pictures at once (default: %(default)s)")
    parser.add_argument("--size", type=int, metavar="PX", help="side in pixels (default: the preset's)")
    parser.add_argument("--dtype", choices=DTYPES, help="default: the fastest sound one of the device")
    parser.add_argument("--device", help="cpu, cuda or cuda:N (default: cuda if there is one)")
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's)")
    parser.add_argument("--backend", metavar="NAME[,NAME]", help="force kernel back ends (see idm-fast ops)")
    parser.add_argument("--no-engine", action="store_true", help="plain torch modules in the place of the engine")
    parser.add_argument("--repeats", type=int, default=10, help="evaluations to take medians of (default: %(default)s)")
    parser.add_argument("--all", action="store_true", help="print every call, not only the twenty longest")
    parser.add_argument("--out", type=Path, default=Path("profile"), help="folder (default: %(default)s)")


def run(args: argparse.Namespace) -> int:
    device, default = Target(args.device).resolved()
    dtype = args.dtype or next(name for name, value in DTYPES.items() if value == default)
    if dtype in TIERS and args.no_engine:
        raise IdmFastError(f"--dtype must be fp32, bf16 or fp16 with --no-engine, got {dtype}")
    chosen_dtype(dtype, device, args.backend)  # before any time is spent
    if args.repeats < 2:
        raise IdmFastError(f"--repeats must be >= 2, got {args.repeats}")
    if args.threads is not None:
        check_threads(args.threads)
        torch.set_num_threads(args.threads)
    check_backend(args.backend)
    work = workload(args.preset, batch=args.batch, size=args.size, steps=2, device=device)
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise IdmFastError(f"--out must be a folder that can be written, got {args.out}: {error.strerror}") from None
    ceilings = roofline.measure(str(device), [DTYPES[n] for n in dict.fromkeys(["fp32", dtype, "bf16"])], cached=True)
    if args.no_engine:
        found = of_modules(work, dtype, args.repeats)
    else:
        engine = ours.engine(work, dtype, args.backend)
        found = of_engine(engine, work, args.repeats)
        with torch.profiler.profile() as profiler, torch.profiler.record_function("walk"):
            ours.run(engine, work)
        profiler.export_chrome_trace(str(args.out / "torch.json"))

    height, width = work.size
    title = f"{args.preset} {height} x {width}, batch {work.batch}, {dtype}, {found.what}"
    about = {"machine": machine(device), "preset": args.preset, "batch": work.batch, "dtype": dtype}
    write_json(args.out / "profile.json", found, ceilings, {**about, "height": height, "width": width})
    write_trace(args.out / "trace.json", found)
    write_roofline(args.out / "roofline.png", found, ceilings, title)
    print(f"{title}: {1e3 * found.step:.2f} ms a step, {found.between:.1%} of it outside of {found.launches} calls\n")
    print(op_table(found, ceilings), end="\n\n")
    print(call_table(found, ceilings, None if args.all else 20), end="\n\n")
    layer = max(found.calls, key=lambda call: call.seconds)
    given = {"size": args.size, "device": args.device, "threads": args.threads, "backend": args.backend}
    command = f"idm-fast profile --preset {args.preset} --batch {work.batch} --dtype {dtype}"
    command += "".join(f" --{name} {value}" for name, value in given.items() if value is not None)
    command += " --no-engine" if args.no_engine else ""
    print(_NSIGHT.format(out=args.out, command=command, layer=f"{layer.layer} {layer.op}"))
    print(f"idm-fast: written to {args.out}", file=sys.stderr)
    return 0
