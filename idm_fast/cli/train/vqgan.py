"""idm-fast train vqgan: the autoencoder that latent models work in."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from idm_fast.cli.train import flags
from idm_fast.config_vqgan import VQGAN_PRESETS
from idm_fast.training.vqgan_loss import VqganLossWeights
from idm_fast.training.vqgan_settings import VqganSettings

_EXAMPLES = """examples:
  idm-fast train vqgan --data faces --out runs/vq --budget-minutes 60
  idm-fast train vqgan --data faces --out runs/vq                   again: goes on where it stopped
  idm-fast train vqgan --data faces --out runs/vq --loss-adversarial 0.8 --loss-adversarial-from 4000
                                            with a patch discriminator, heard from step 4000 on
"""
_DESCRIPTION = """Trains a vector-quantised autoencoder. sheets/ shows, from left to right: a face, through
the codes, without them, degraded, the degraded one through the codes; reconstruction.csv has the
figures of the same moments. Stops at --steps, or after --budget-minutes with its state kept; the
same command goes on exactly where it stopped."""


def add_parser(kinds: Any) -> None:
    t = kinds.add_parser(
        "vqgan", help="a vector-quantised autoencoder (CLR-Face's latents)",
        description=_DESCRIPTION, epilog=_EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    defaults = VqganSettings(Path(), Path())
    flags.add_run(t, out="the run: state.pt, log.csv, reconstruction.csv, sheets/, model.safetensors")
    presets = sorted(VQGAN_PRESETS)
    t.add_argument("--preset", default=defaults.preset, choices=presets, help="network to train (default: %(default)s)")
    flags.add_numbers(t, defaults)
    t.add_argument(
        "--init-from", type=Path, help="model file of the same network to start from, codes and all (--codebook-lead 0)"
    )
    flags.add_losses(t, VqganLossWeights)


def run(args: argparse.Namespace) -> int:
    settings = flags.settings(args, VqganSettings, VqganLossWeights)

    from idm_fast.training.vqgan import VqganTrainer  # heavy: only when training

    return flags.train(args, settings, VqganTrainer)
