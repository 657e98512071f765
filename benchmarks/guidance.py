"""What an identity gradient costs, and what cheaper ones lose: at reduced resolutions, and through a linear decoder.

``python benchmarks/guidance.py --model clr-face.safetensors --data FACES [--faces 16] [--json FILE]``. The latents are
the prior's one-step answers to severely degraded validation faces, the targets those of the recovery network. A row a
way: GFLOPs and time of a gradient of one face (in turns with the others); its cosine with the full gradient; and of the
full gradient's gain in identity, measured through the real decoder behind a step of ``--scale``, the part that it
keeps.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from idm_fast import checkpoints
from idm_fast.bench.machine import machine
from idm_fast.bench.text import markdown, number
from idm_fast.bench.timing import Candidate, interleaved
from idm_fast.diffusion import Schedule, initial_noise
from idm_fast.errors import IdmFastError
from idm_fast.files import atomic
from idm_fast.identity import IdentityGradient
from idm_fast.models.clr_face import ClrFace
from idm_fast.models.light_decoder import LightDecoder
from idm_fast.models.recognition import Recognition
from idm_fast.registry import Target
from idm_fast.training.data import list_faces, load_crop
from idm_fast.training.degradation import degrade_level

HEAD = ("gradient", "GFLOP", "ms", "cosine", "gain kept")
_FITTED_ON = 64  # training faces


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="a whole CLR-Face model")
    parser.add_argument("--data", type=Path, required=True, help="aligned crops with faces.csv")
    parser.add_argument("--faces", type=int, default=16, help="validation faces (default: %(default)s)")
    parser.add_argument("--scale", type=float, default=0.1, help="of a step, in deviations (default: %(default)s)")
    parser.add_argument("--device", help="cpu, cuda or cuda:N (default: cuda if there is one)")
    parser.add_argument("--seconds", type=float, default=10.0, help="of all timing (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="results file to write")
    return parser.parse_args(arguments)


@torch.no_grad()
def estimates(model: ClrFace, recognition: Recognition, faces: Tensor) -> tuple[Tensor, Tensor]:
    """(x0_hat of one step from pure noise, recovered embeddings) of ``faces`` [N, 3, S, S], severely degraded."""
    y = torch.stack([degrade_level(face, "severe", seed) for seed, face in enumerate(faces)])
    y = y.to(next(model.parameters()).device)
    cond, seeds = model.encode(y), torch.arange(len(y), device=y.device)
    schedule = Schedule.from_config(model.config.prior.diffusion)
    last = schedule.timesteps(1, model.config.prior.spacing)
    t = torch.from_numpy(schedule.network_time(last)).float().to(y.device).expand(len(y))
    x0_hat = model.prior(initial_noise(seeds, cond.shape, y.device), t, cond)
    return x0_hat.contiguous(), model.irn(y, recognition)


def ways(
    model: ClrFace, recognition: Recognition, target: Tensor, light: LightDecoder, scale: float
) -> dict[str, IdentityGradient]:
    """Each way of finding the gradient of steps of ``scale``, the full one first."""
    sides = [factor for factor in (1, 2, 4) if model.config.latent_size % factor == 0]
    size = model.config.image_size
    given = (model.vqgan, recognition, target)
    found = {f"{size // f} px": IdentityGradient(*given, factor=f, scale=scale) for f in sides}
    return found | {"linear decoder": IdentityGradient(*given, light=light, scale=scale)}


def rows(
    model: ClrFace,
    recognition: Recognition,
    light: LightDecoder,
    z: Tensor,
    target: Tensor,
    scale: float,
    seconds: float,
) -> list[dict[str, Any]]:
    every, one = (ways(model, recognition, some, light, scale) for some in (target, target[:1]))
    spent = interleaved(
        {name: Candidate(lambda _, way=way: way(z[:1])) for name, way in one.items()},  # type: ignore[misc]
        str(z.device), seconds,
    )  # fmt: skip
    full = next(iter(every.values()))
    with torch.no_grad():
        before = full.distance(z)
    found: list[dict[str, Any]] = []
    reference, gains = torch.empty(0), torch.empty(0)
    for name, way in every.items():
        with FlopCounterMode(display=False) as counter:
            one[name](z[:1])
        gradient = way(z)
        with torch.no_grad():
            gained = before - full.distance(z - scale * gradient)
        if not found:
            reference, gains = gradient, gained
        found.append(
            {
                "name": name, "gflop": counter.get_total_flops() / 1e9, "ms": 1e3 * spent[name].median,
                "p20_ms": 1e3 * spent[name].p20, "p80_ms": 1e3 * spent[name].p80,
                "cosine": float(F.cosine_similarity(gradient.flatten(1), reference.flatten(1)).mean()),
                "gain": float(gained.mean()), "gain_kept": float(gained.mean() / gains.mean()),
            }
        )  # fmt: skip
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    args = parse(arguments)
    try:
        device, _ = Target(args.device).resolved()
        model, recognition = checkpoints.load(args.model).module, Recognition().to(device)
        if not isinstance(model, ClrFace):
            raise IdmFastError(f"{args.model}: must hold a whole CLR-Face model, got a {type(model).__name__}")
        layout: Any = {"memory_format": torch.channels_last}  # as on a restorer's way
        model, recognition = model.to(device, **layout), recognition.to(**layout)
        side = model.config.image_size

        def read(split: str, count: int) -> Tensor:
            files = list_faces(args.data, split)
            return torch.stack([load_crop(f.path, side) for f in files[:: max(1, len(files) // count)][:count]])

        light = LightDecoder.fit(model.vqgan, read("train", _FITTED_ON))
        z, target = estimates(model, recognition, read("val", args.faces))
        found = rows(model, recognition, light, z, target, args.scale, args.seconds)
    except IdmFastError as error:
        print(f"guidance: {error}", file=sys.stderr)
        return 2
    gain = f"the full gradient gains {found[0]['gain']:.4f} cosine"
    print(f"{len(z)} faces, steps of at most {args.scale} deviations; {gain}")
    print(markdown(HEAD, [[r["name"], *(number(r[k]) for k in ("gflop", "ms", "cosine", "gain_kept"))] for r in found]))
    if args.json:
        report = {"machine": machine(device), "model": args.model.name, "scale": args.scale, "rows": found}
        with atomic(args.json) as path:
            path.write_text(json.dumps(report, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
