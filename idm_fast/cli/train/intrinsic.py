"""idm-fast train intrinsic: a conditional diffusion restorer."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from idm_fast.cli.train import flags
from idm_fast.training.losses import LossWeights
from idm_fast.training.settings import TrainSettings

_EXAMPLES = """examples:
  idm-fast train intrinsic --data faces --out runs/mine --budget-minutes 60
  idm-fast train intrinsic --data faces --out runs/mine             again: goes on where it stopped
  idm-fast train intrinsic --data photos --align --out runs/mine    photographs, not aligned crops
  torchrun --nproc-per-node 8 -m idm_fast train intrinsic --data faces --out runs/mine
"""
_DESCRIPTION = """Trains on sharp faces degraded at random. Stops at --steps, or after --budget-minutes with its state
kept; the same command goes on exactly where it stopped and ends with the same weights."""


def add_parser(kinds: Any) -> None:
    t = kinds.add_parser(
        "intrinsic", help="a conditional diffusion restorer (IDM, intrinsic part)",
        description=_DESCRIPTION, epilog=_EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    flags.add_run(t, out="the run: state.pt, log.csv, sheets/, model.safetensors")
    flags.add_training(t)
    t.add_argument("--init-from", type=Path, help="model file to start from; tensors of other shapes start anew")
    flags.add_losses(t)


def run(args: argparse.Namespace) -> int:
    settings = flags.settings(args, TrainSettings, LossWeights)

    from idm_fast.training.intrinsic import Trainer  # heavy: only when training

    return flags.train(args, settings, Trainer)
