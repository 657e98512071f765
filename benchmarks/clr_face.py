"""Times whole restorations by CLR-Face and by a model that works on pixels, at equal size and steps, in turns.

    python benchmarks/clr_face.py --steps 1 4 --json out.json

CLR-Face encodes, walks over latents and decodes; without guidance, which --guided gives rows of its own (they need the
recognition weights). A model without trained weights runs on random ones, which cost as much. Wall clock; compare the
rows of one run only.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from idm_fast.bench.machine import machine
from idm_fast.bench.timing import Candidate, interleaved
from idm_fast.bench.work import autoencoder_layers, layers, total_flops
from idm_fast.clr_face import ClrFaceRestorer
from idm_fast.config import preset
from idm_fast.config_clr_face import clr_face_preset
from idm_fast.crops import CropRestorer
from idm_fast.errors import IdmFastError
from idm_fast.face_model import FaceModel
from idm_fast.files import atomic
from idm_fast.models.clr_face import ClrFace
from idm_fast.models.unet import UNet
from idm_fast.registry import Target, load_models, shipped
from idm_fast.sampling import GuidanceSettings, SampleSettings

NAMES = {"clr-face-128": "clr-face-128", "idm-128": "idm-face-128"}  # presets, and the shipped models of them
FREE = GuidanceSettings(0.0)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clr-face", default="clr-face-128", help="preset or model file (default: %(default)s)")
    parser.add_argument("--idm", default="idm-128", help="preset or model file (default: %(default)s)")
    parser.add_argument("--steps", nargs="+", type=int, default=[1, 4])
    parser.add_argument("--batch", type=int, default=1, help="faces at once (default: %(default)s)")
    parser.add_argument("--guided", action="store_true", help="also CLR-Face with guidance, as --guidance-* say")
    parser.add_argument("--guidance-every", nargs="+", type=int, default=[1])
    parser.add_argument("--guidance-resolution", nargs="+", type=int, help="default: the model's size")
    parser.add_argument("--device")
    parser.add_argument("--dtype")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seconds", type=float, default=20.0, help="for each number of steps (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="results file to write")
    return parser.parse_args(arguments)


def model(name: str, target: Target) -> FaceModel:
    """A shipped model, a file's, or a preset's with random weights."""
    if name not in NAMES or NAMES[name] in shipped():
        return load_models(NAMES.get(name, name), target)[0]
    torch.manual_seed(0)
    if name.startswith("idm"):
        config = preset(name)
        return CropRestorer(config, UNet(config.unet), *target.resolved())
    whole = clr_face_preset(name)
    return ClrFaceRestorer(whole, ClrFace(whole), *target.resolved())


def gflop(restorer: FaceModel, settings: SampleSettings, batch: int) -> float:
    """Of one restoration without guidance."""
    size, evaluations = restorer.size, restorer.evaluations(settings)
    inside = size if not isinstance(restorer, ClrFaceRestorer) else restorer.config.latent_size
    flops = evaluations * total_flops(layers(restorer.walked.unet, batch, inside, inside))
    if isinstance(restorer, ClrFaceRestorer):
        flops += total_flops(autoencoder_layers(restorer.config.vqgan, batch, size, size))
    return flops / 1e9


def rows(options: argparse.Namespace) -> list[dict[str, Any]]:
    target = Target(options.device, options.dtype)
    clr, idm = model(options.clr_face, target), model(options.idm, target)
    if clr.size != idm.size:
        raise IdmFastError(f"models must restore crops of one size, got {clr.size} and {idm.size}")
    y = torch.rand(options.batch, 3, clr.size, clr.size, generator=torch.Generator().manual_seed(0)) * 2 - 1
    seeds, found = torch.arange(options.batch), []
    for steps in options.steps:
        who: dict[str, tuple[FaceModel, SampleSettings]] = {
            clr.config.name: (clr, SampleSettings(steps, guidance=FREE)), idm.config.name: (idm, SampleSettings(steps)),
        }  # fmt: skip
        for every in options.guidance_every if options.guided else ():
            for side in options.guidance_resolution or [clr.size]:
                asked = GuidanceSettings(clr.config.guidance_scale or 1.0, every=every, resolution=side)
                who[f"{clr.config.name}, guided, every {every}, {side} px"] = (
                    clr,
                    SampleSettings(steps, guidance=asked),
                )
        spreads = interleaved(
            {name: Candidate(lambda _, m=each, s=asked: m.restore(y, seeds, s)) for name, (each, asked) in who.items()},
            str(clr.device), options.seconds, wall=True, pause=0.02,
        )  # fmt: skip
        for name, (each, asked) in who.items():
            guided = bool(asked.guidance.scale)
            work = None if guided else gflop(each, asked, options.batch)
            found.append({"name": name, "steps": steps, "batch": options.batch, "gflop": work} | asdict(spreads[name]))
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    torch.set_num_threads(options.threads)
    try:
        measured = rows(options)
        device = Target(options.device).resolved()[0]
        document = {"machine": machine(device), "threads": options.threads, "rows": measured}
        if options.json:
            with atomic(options.json) as path:
                path.write_text(json.dumps(document, indent=1) + "\n")
    except IdmFastError as error:
        print(f"clr_face: {error}", file=sys.stderr)
        return 2
    print("| model | steps | GFLOP | ms (p20 - p80) |\n|---|--:|--:|--:|")
    for row in measured:
        median, low, high = (f"{1e3 * row[key]:.1f}" for key in ("median", "p20", "p80"))
        work = "-" if row["gflop"] is None else f"{row['gflop']:.1f}"
        print(f"| {row['name']} | {row['steps']} | {work} | {median} ({low} - {high}) |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
