"""idm-fast clean: a data set of photographs or aligned crops in, the enhanced set out."""

from __future__ import annotations

import argparse
import json
import sys
from contextlib import redirect_stdout
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

from tqdm import tqdm

from idm_fast.clean.manifest import DiskError
from idm_fast.clean.options import CleanOptions, CleanSummary
from idm_fast.clean.session import clean
from idm_fast.cli.checks import add_bounds
from idm_fast.diffusion import SOLVERS
from idm_fast.errors import IdmFastError
from idm_fast.registry import DEFAULT_MODEL, FAMILIES, shipped

_DESCRIPTION = """Restores the pictures of a data set themselves, so that a model can be trained on better ones:
reads the folder IN, and writes the enhanced set to the folder OUT under the same names. IN is
never changed.

Each restored face is compared with its original. Beyond --max-identity-distance (recognition) or
--max-low-frequency (what a 16 x 16 thumbnail shows) three quarters, a half and a quarter of the
change are tried, and at last the original is kept, byte for byte, so the set stays whole.

IN may be aligned crops with a faces.csv (only split 'train' is restored, the others are copied),
aligned crops without one, or photographs, whose faces are found and pasted back."""
_EPILOG = """OUT holds the pictures, clean.jsonl (a record a picture), clean.json (the settings) and, where IN has
one, faces.csv with a column 'cleaned'. The same command goes on where a stopped or killed run was;
other settings need another OUT. Failed pictures are tried again.

exit code: 0 all good, 1 some pictures failed (each is named on standard error) or the disk is full,
2 wrong usage (nothing was done), 130 stopped by Ctrl-C (what was written is whole).

examples:
  idm-fast clean faces cleaned                             aligned crops with their faces.csv
  idm-fast clean faces cleaned --strength 0.5 --blend 0.7  nearer to the originals
  idm-fast clean photos cleaned --report report.png        a sheet of the largest changes
  idm-fast clean faces cleaned --workers 8                 eight processes on this machine
  idm-fast clean faces cleaned --ray --workers 64          64 actors of a Ray cluster (RAY_ADDRESS)
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    d = CleanOptions()
    parser.description, parser.epilog = _DESCRIPTION, _EPILOG
    parser.add_argument("source", type=Path, metavar="IN", help="folder of aligned crops or photographs")
    parser.add_argument("out", type=Path, metavar="OUT", help="folder for the enhanced set: new, or of an earlier run")

    p = parser.add_argument_group("model")
    names = ", ".join([*FAMILIES, *shipped()])
    p.add_argument("--model", default=DEFAULT_MODEL, help=f"{names}, or a .safetensors file (default: %(default)s)")
    p.add_argument("--steps", type=int, help="sampling steps (default: the model's)")
    p.add_argument("--sampler", choices=list(SOLVERS), help="solver (default: the model's)")
    p.add_argument(
        "--strength", type=float,
        help="start step as a part of the way: 1 starts from pure noise, less from the noised original and so stays "
        "nearer to it (default: the model's)",
    )  # fmt: skip
    p.add_argument("--seed", type=int, default=d.seed, help="the noise; each picture draws its own (default: 0)")
    p.add_argument(
        "--guidance-scale", type=float, metavar="S",
        help="of CLR-Face models: how far a face is moved towards the identity that was recovered; 0: not at all "
        "(default: the model's)",
    )  # fmt: skip

    p = parser.add_argument_group("rule")
    add_bounds(p, "--", d.max_identity_distance, d.max_low_frequency)
    p.add_argument(
        "--blend", type=float, default=d.blend, help="how much of a restored face is taken, 0..1 (default: 1)"
    )

    p = parser.add_argument_group("pictures")
    kind = p.add_mutually_exclusive_group()
    kind.add_argument("--aligned", action="store_true", default=None, help="each picture is one aligned, square crop")
    kind.add_argument(
        "--photographs", dest="aligned", action="store_false", default=None,
        help="find the faces (default: aligned where IN has a faces.csv, or its pictures are squares of one size)",
    )  # fmt: skip
    p.add_argument("--ext", help="png, jpg, webp, ..., or auto, the original's (default: png for crops, else auto)")
    p.add_argument("--limit", type=int, help="only the first so many pictures; a later run may go on")

    p = parser.add_argument_group("machine")
    p.add_argument("--workers", type=int, default=1, help="processes, or actors with --ray (default: %(default)s)")
    p.add_argument("--ray", action="store_true", help="on a Ray cluster that sees IN and OUT (RAY_ADDRESS, else here)")
    p.add_argument("--batch-size", type=int, default=d.batch_size, help="faces a network call (default: %(default)s)")
    p.add_argument("--device", help="cpu, cuda or cuda:N (default: cuda if there is one)")
    p.add_argument("--dtype", choices=["fp32", "bf16", "fp16", "int8"], help="default: the fastest sound one")

    p = parser.add_argument_group("what is said")
    p.add_argument("--report", type=Path, metavar="FILE.png", help="sheet of the largest changes, and histograms")
    p.add_argument("--json", action="store_true", help="print the summary as one JSON document on standard output")


def run(args: argparse.Namespace) -> int:
    if args.report is not None:
        _check_report(args.report, args.source, args.out)
    options = CleanOptions(
        args.steps, args.sampler, args.strength, args.seed, args.max_identity_distance, args.max_low_frequency,
        args.blend, args.aligned, None if args.ext is None else args.ext.lower().removeprefix("."),
        args.batch_size, args.device, args.dtype, args.limit, args.guidance_scale,
    )  # fmt: skip
    with tqdm(unit="picture", file=sys.stderr, disable=None) as bar:

        def progress(done: int, total: int, summary: CleanSummary, record: dict[str, Any] | None) -> None:
            if bar.total is None:
                bar.total, bar.initial = total, done  # so that the rate is this run's
                tqdm.write(f"idm-fast: {args.source}: {total} pictures, {summary.taken_as}", file=sys.stderr)
            bar.set_postfix_str(
                f"{summary.kept} kept, {summary.blended} blended, {summary.rejected} rejected", refresh=False
            )
            bar.update(done - bar.n)
            if record is not None and record["result"] == "failed":
                tqdm.write(f"idm-fast: error: {record['reason']}", file=sys.stderr)

        try:
            with redirect_stdout(sys.stderr):  # Ray tells of dead workers on standard output, which is the document's
                summary = clean(
                    args.source, args.out, args.model, options, workers=args.workers, progress=progress, ray=args.ray
                )
        except DiskError as error:
            bar.close()
            print(f"idm-fast: error: {error}; the same command goes on from here", file=sys.stderr)
            return 1
    _say(summary)
    if args.report is not None:
        from idm_fast.clean.report import draw

        draw(args.source, args.out, summary, args.report)
    if args.json:
        print(json.dumps(summary.to_dict(), indent=1))
    return 1 if summary.failed else 0


def _say(summary: CleanSummary) -> None:
    counts = [f"{getattr(summary, name)} {name}" for name in ("kept", "blended", "rejected")]
    counts += [f"{n} {name}" for name in ("copied", "duplicate", "failed") if (n := getattr(summary, name))]
    said = f"{summary.out}: {summary.total} pictures: {', '.join(counts)}"
    if summary.before:
        said += f"; {summary.before} done before"
    if summary.seconds:
        said += f"; {summary.pictures_per_second:.2f} pictures/s"
    print(f"idm-fast: {said}", file=sys.stderr)


def _check_report(path: Path, source: Path, out: Path) -> None:
    if path.suffix.lower() != ".png" or path.is_dir():
        raise IdmFastError(f"--report must be a file that ends in .png, got {path}")
    # In the output too it would be one of the pictures that the next model is trained on.
    for name, folder in (("source", source), ("output", out)):
        if path.resolve().is_relative_to(folder.resolve()):
            raise IdmFastError(f"--report must lie outside of the {name} {folder}, got {path}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=path.parent):  # before the hours of work that it is to tell of
            pass
    except OSError as error:
        raise IdmFastError(f"--report must lie in a writable folder, got {path}: {error.strerror or error}") from None
