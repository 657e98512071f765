"""``idm-fast ops``: which backend can run which operation here, and why not."""

from __future__ import annotations

import argparse
import json
from typing import Any

import torch

from idm_fast.errors import IdmFastError
from idm_fast.kernels.dispatch import BackendError, forced_backends
from idm_fast.kernels.extension import missing, native
from idm_fast.ops import BACKENDS, OPS

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = "For each fused operation, the back ends from the fastest to the slowest: yes, or why not."
    parser.add_argument("--device", help="torch device to ask about (default: cuda where there is one, else cpu)")
    parser.add_argument(
        "--dtype", choices=DTYPES, help="element type to ask about (default: float16 on cuda, else float32)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON document")


def run(args: argparse.Namespace) -> int:
    report = describe(args.device, args.dtype)
    print(json.dumps(report, indent=2) if args.json else as_text(report))
    return 0


def describe(device: str | None = None, dtype: str | None = None) -> dict[str, Any]:
    """The table as plain data: ``ops[name]`` = {"formula", "automatic", "backends": {backend: "yes" or the reason}}.

    ``forced``: what ``IDM_FAST_BACKEND`` names, in order of preference. Raises ``IdmFastError`` where it names no back
    end, and for a device that is not there.
    """
    try:
        forced = forced_backends()
    except BackendError as error:
        raise IdmFastError(f"IDM_FAST_BACKEND: {error}") from None
    try:
        place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError as error:
        raise IdmFastError(f"--device: {error}") from error
    if place.type == "cuda" and not torch.cuda.is_available():
        raise IdmFastError(f"--device: device must be present = a CUDA device, got {device} and none is visible")
    dtype = dtype or ("float16" if place.type == "cuda" else "float32")
    return {
        "device": str(place),
        "dtype": dtype,
        "forced": list(forced),
        "native": {"cpu_isa": native.cpu_isa(), "threads": native.threads_runtime()}
        if native
        else {"missing": missing},
        "ops": {
            name: {
                "formula": op.formula,
                "automatic": op.automatic(place, DTYPES[dtype]),
                "backends": {b: reason or "yes" for b, reason in op.table(place, DTYPES[dtype]).items()},
            }
            for name, op in OPS.items()
        },
    }


def as_text(report: dict[str, Any]) -> str:
    native_line = ", ".join(f"{key} {value}" for key, value in report["native"].items())
    lines = [f"{report['device']}, {report['dtype']}; native module: {native_line}"]
    for name, row in report["ops"].items():
        lines += ["", f"{name}: {row['formula']}"]
        for backend in BACKENDS:
            mark = "*" if backend == row["automatic"] else " "
            lines.append(f"  {mark} {backend:<10} {row['backends'][backend]}")
    lines += ["", "* runs unless another is forced with --backend or IDM_FAST_BACKEND"]
    return "\n".join([*lines, f"IDM_FAST_BACKEND forces {', '.join(report['forced'])}"] if report["forced"] else lines)
