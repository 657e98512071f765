"""idm-fast train latent-mask: the mask of identity guidance, and the whole CLR-Face model."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from idm_fast.cli.train import flags
from idm_fast.training.identity_settings import LatentMaskSettings, MaskLossWeights

_EXAMPLES = """examples:
  idm-fast train latent-mask --vqgan runs/vq/model.safetensors --prior runs/prior/model.safetensors \\
      --irn runs/irn/model.safetensors --data faces --out runs/clr-face --budget-minutes 30
                                            the same command again: goes on where it stopped
"""
_DESCRIPTION = """Trains which channels and positions of a latent identity guidance may change, and writes the
whole CLR-Face model: the last step of its recipe, after train vqgan, latent-prior and identity. The
parts stay as they are. sheets/ shows, from left to right: severely degraded, restored without
guidance, with it everywhere, through the mask, clean; sheets/mask-* the mask; guidance.csv has the
figures of the same moments. Stops at --steps, or after --budget-minutes with its state kept; the
same command goes on exactly where it stopped. Needs the recognition network's weights."""


def add_parser(kinds: Any) -> None:
    t = kinds.add_parser(
        "latent-mask", help="the mask of identity guidance, and the whole CLR-Face model",
        description=_DESCRIPTION, epilog=_EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    defaults = LatentMaskSettings(Path(), Path())
    flags.add_run(t, out="the run: state.pt, log.csv, guidance.csv, sheets/, model.safetensors (the whole model)")
    for name, text in (("vqgan", "a VQGAN"), ("prior", "a prior over its latents"), ("irn", "an identity network")):
        t.add_argument(f"--{name}", type=Path, required=True, metavar="FILE", help=f"model file of {text}, trained")
    t.add_argument("--name", dest="preset", default=defaults.preset, help="of the whole model (default: %(default)s)")
    flags.add_numbers(t, defaults)
    t.add_argument(
        "--guidance-interval", type=float, nargs=2, metavar=("A", "B"), default=defaults.guidance_interval,
        help="the part of the way that is guided, in 0..1 (default: all of it)",
    )  # fmt: skip
    flags.add_losses(t, MaskLossWeights)


def run(args: argparse.Namespace) -> int:
    args.guidance_interval = tuple(args.guidance_interval)
    settings = flags.settings(args, LatentMaskSettings, MaskLossWeights)

    from idm_fast.training.latent_mask import LatentMaskTrainer  # heavy: only when training

    return flags.train(args, settings, LatentMaskTrainer)
