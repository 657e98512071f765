"""idm-fast train generator: an unconditional diffusion model, the measure of a data set."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from idm_fast.cli.train import flags
from idm_fast.training.settings import GeneratorSettings, generators

_EXAMPLES = """examples:
  idm-fast train generator --data faces --out runs/gen --budget-minutes 10
  idm-fast train generator --data faces --out runs/gen              again: goes on where it stopped
  idm-fast train generator --data cleaned --out runs/gen-2          the same on another set
"""
_DESCRIPTION = """Trains a model that makes faces from noise. The same settings on two data sets tell
which of them teaches better: benchmarks/generation.py does that and measures. All pictures are
held in memory. Stops at --steps, or after --budget-minutes with its state kept; the same command
goes on exactly where it stopped."""


def add_parser(kinds: Any) -> None:
    t = kinds.add_parser(
        "generator", help="an unconditional generator, to compare data sets by",
        description=_DESCRIPTION, epilog=_EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    defaults = GeneratorSettings(Path(), Path())
    flags.add_run(t, out="the run: state.pt, log.csv, sheets/, model.safetensors")
    t.add_argument(
        "--preset", default=defaults.preset, choices=generators(), help="network to train (default: %(default)s)"
    )
    flags.add_numbers(t, defaults)


def run(args: argparse.Namespace) -> int:
    settings = flags.settings(args, GeneratorSettings)

    from idm_fast.training.generator import GeneratorTrainer  # heavy: only when training

    return flags.train(args, settings, GeneratorTrainer)
