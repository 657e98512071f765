"""idm-fast train latent-prior: CLR-Face's diffusion over the latents of a VQGAN."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from idm_fast.cli.train import flags
from idm_fast.training.latent_loss import LatentLossWeights
from idm_fast.training.latent_settings import LatentPriorSettings, priors

_EXAMPLES = """examples:
  idm-fast train latent-prior --vqgan runs/vq/model.safetensors --data faces --out runs/prior --budget-minutes 60
                                            the same command again: goes on where it stopped
  idm-fast train latent-prior --vqgan runs/vq/model.safetensors --data faces --out runs/prior --loss-lpips-alex 0
                                            squares of latents only: faster steps, softer faces
  torchrun --nproc-per-node 8 -m idm_fast train latent-prior --vqgan V --data faces --out runs/prior
"""
_DESCRIPTION = """Trains a conditional diffusion model on the latents of sharp faces, shown the latents of
the same faces degraded at random. The VQGAN stays as it is, and the model file notes which one it
was. sheets/ shows, from left to right: degraded, restored in one step, in four, clean;
validation.csv has the figures of the same moments. Stops at --steps, or after --budget-minutes with
its state kept; the same command goes on exactly where it stopped."""


def add_parser(kinds: Any) -> None:
    t = kinds.add_parser(
        "latent-prior", help="a diffusion restorer on a VQGAN's latents (CLR-Face's prior)",
        description=_DESCRIPTION, epilog=_EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    defaults = LatentPriorSettings(Path(), Path())
    flags.add_run(t, out="the run: state.pt, log.csv, validation.csv, sheets/, model.safetensors")
    t.add_argument("--vqgan", type=Path, required=True, metavar="FILE", help="model file of a trained VQGAN")
    t.add_argument(
        "--preset", default=defaults.preset, choices=priors(), help="network to train (default: %(default)s)"
    )
    flags.add_numbers(t, defaults)
    t.add_argument("--init-from", type=Path, help="model file to start from; tensors of other shapes start anew")
    flags.add_losses(t, LatentLossWeights)


def run(args: argparse.Namespace) -> int:
    settings = flags.settings(args, LatentPriorSettings, LatentLossWeights)

    from idm_fast.training.latent_prior import LatentPriorTrainer  # heavy: only when training

    return flags.train(args, settings, LatentPriorTrainer)
