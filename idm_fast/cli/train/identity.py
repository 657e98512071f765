"""idm-fast train identity: the identity recovery network of CLR-Face."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from idm_fast.cli.train import flags
from idm_fast.models.irn import IRN_PRESETS
from idm_fast.training.identity_settings import IdentitySettings

_EXAMPLES = """examples:
  idm-fast train identity --data faces --out runs/irn --budget-minutes 30
  idm-fast train identity --data faces --out runs/irn               again: goes on where it stopped
"""
_DESCRIPTION = """Trains the network that recovers the recognition embedding of the clean face from a
degraded one: where identity guidance goes. recovery.csv has, on validation faces at every level of
degradation, the cosine and the Euclidean distance to the true embedding and how often that is the
nearest one, of the recovered embedding, the degraded face's own, and the mean of all faces; sheets/
plots the cosines face by face. Stops at --steps, or after --budget-minutes with its state kept; the
same command goes on exactly where it stopped. Needs the recognition network's weights."""


def add_parser(kinds: Any) -> None:
    t = kinds.add_parser(
        "identity", help="the identity recovery network (CLR-Face)",
        description=_DESCRIPTION, epilog=_EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    defaults = IdentitySettings(Path(), Path())
    flags.add_run(t, out="the run: state.pt, log.csv, recovery.csv, sheets/, model.safetensors")
    presets = sorted(IRN_PRESETS)
    t.add_argument("--preset", default=defaults.preset, choices=presets, help="network to train (default: %(default)s)")
    flags.add_numbers(t, defaults)


def run(args: argparse.Namespace) -> int:
    settings = flags.settings(args, IdentitySettings)

    from idm_fast.training.identity import IdentityTrainer  # heavy: only when training

    return flags.train(args, settings, IdentityTrainer)
