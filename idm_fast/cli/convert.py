"""idm-fast convert: another project's weights as a file of this one, or any of them as a folder of diffusers."""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

from tqdm import tqdm

from idm_fast.checkpoints import FORMATS, convert, export
from idm_fast.checkpoints.conversion import DTYPES
from idm_fast.checkpoints.settings import from_pairs

_STAGES = {"open": "opening", "check": "checking", "hash": "hashing", "write": "writing"}
_EXAMPLES = """examples:
  idm-fast convert difface.pth difface.safetensors
  idm-fast convert 256x256_diffusion.pt gd.safetensors --set num_head_channels=64
  idm-fast convert sr3_gen.pth sr3.safetensors --dtype fp16 --license "none stated"
  idm-fast convert latent.ckpt folder --to diffusers --no-ema
Nothing that is stored in a file is run. What the keys cannot tell has a default, which is said;
--set changes it, and idm-fast info FILE lists it. docs/checkpoints.md has the commands for every
family.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = """Makes one .safetensors of this project of weights of a public model family, or with
--to diffusers a folder that diffusers loads of any model file."""
    parser.epilog = _EXAMPLES
    parser.add_argument(
        "input", metavar="IN", type=Path, help="a .pt, .pth, .ckpt or .safetensors file, or a diffusers folder"
    )
    parser.add_argument("output", metavar="OUT", type=Path, help="the .safetensors file, or folder, to write")
    add_reading_arguments(parser)
    parser.add_argument(
        "--to", choices=["native", "diffusers"], default="native", help="what OUT is: one file of ours, or a folder"
    )
    parser.add_argument("--dtype", choices=DTYPES, help="precision of the weights in OUT (default: as they are stored)")
    parser.add_argument("--license", default="", metavar="TEXT", help="a note on the weights' terms, kept in OUT")
    parser.add_argument("--force", action="store_true", help="overwrite OUT")
    parser.add_argument("--json", action="store_true", help="print one JSON document")


def add_reading_arguments(parser: argparse.ArgumentParser) -> None:
    """How a foreign file is to be read: for every verb that takes one."""
    parser.add_argument(
        "--format", default="auto", choices=["auto", *FORMATS], metavar="FORMAT",
        help=f"of IN: {', '.join(FORMATS)} (default: auto, told by its keys)",
    )  # fmt: skip
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="a setting that the keys cannot tell; repeatable",
    )
    parser.add_argument(
        "--ema", action=argparse.BooleanOptionalAction, default=None,
        help="averaged (EMA) or raw weights where a file has both (default: averaged)",
    )  # fmt: skip


def run(args: argparse.Namespace) -> int:
    begin = time.perf_counter()
    if args.to == "diffusers":
        return _export(args)
    with tqdm(total=len(_STAGES), disable=None, leave=False, bar_format="{desc}: {bar} {elapsed}") as bar:

        def progress(stage: str) -> None:
            bar.set_description_str(_STAGES[stage])
            bar.update()

        opened = convert(
            args.input, args.output, from_pairs(args.set), args.format, averaged=args.ema, dtype=args.dtype,
            license=args.license, force=args.force, progress=progress,
        )  # fmt: skip
    said: dict[str, Any] = {
        "output": str(args.output), "bytes": args.output.stat().st_size,
        "seconds": round(time.perf_counter() - begin, 2), "format": opened.format.name,
        "assumed": opened.settings.assumed,
    }  # fmt: skip
    if args.json:
        print(json.dumps(said, indent=1))
        return 0
    for each in opened.settings.missing():
        text = f"assumed {each['name']}={json.dumps(each['assumed'])} ({each['allowed']}): {each['decides']}"
        print(text, file=sys.stderr)
    print(f"{args.output}: {said['bytes'] / 1e6:.1f} MB, {opened.format.title}, {said['seconds']} s")
    return 0


def _export(args: argparse.Namespace) -> int:
    loaded = export(args.input, args.output, from_pairs(args.set), args.format, averaged=args.ema, dtype=args.dtype)
    assumed = loaded.source.get("assumed", {})
    if args.json:
        print(json.dumps({"output": str(args.output), "assumed": assumed}, indent=1))
        return 0
    for name, value in assumed.items():
        print(f"assumed {name}={json.dumps(value)}", file=sys.stderr)
    print(
        f"{args.output}: a folder for diffusers, {sum(f.stat().st_size for f in args.output.rglob('*')) / 1e6:.1f} MB"
    )
    return 0
