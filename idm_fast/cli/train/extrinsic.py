"""idm-fast train extrinsic: a restorer that cleans its own training targets, round by round."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from idm_fast.clean import CleanOptions
from idm_fast.cli.checks import add_bounds
from idm_fast.cli.train import flags
from idm_fast.diffusion import SOLVERS
from idm_fast.training.degradation import LEVELS
from idm_fast.training.losses import LossWeights
from idm_fast.training.rounds import JudgeSettings, RoundSettings
from idm_fast.training.settings import TrainSettings

_EXAMPLES = """examples:
  from scratch: R_0 is trained for 4,000 steps, then two rounds of cleaning and 1,000 steps each
    idm-fast train extrinsic --data faces --out runs/r --rounds 2 --steps 4000 --round-steps 1000

  from a shipped model: R_0 is there already; --control tells what the extra steps alone would bring
    idm-fast train extrinsic --data faces --out runs/r --init-from idm-face-128 --control

  an hour now, the rest another day: the same command goes on exactly where it stopped
    idm-fast train extrinsic --data faces --out runs/r --init-from idm-face-128 --budget-minutes 60

  a third round after two; the first two stay as they are
    idm-fast train extrinsic --data faces --out runs/r --init-from idm-face-128 --rounds 3

  soft crops too, once they are cleaned
    idm-fast train extrinsic --data faces --out runs/s --min-native-px 250 --round-min-native-px 99

  many GPUs (or: accelerate launch --module idm_fast train extrinsic ...)
    torchrun --nproc-per-node 8 -m idm_fast train extrinsic --data faces --out runs/r
"""
_DESCRIPTION = """Extrinsic enhancement (IDM): R_0 is trained on the faces of --data, or loaded; each round it cleans
them, and the next restorer goes on from it on the cleaned ones.

  OUT/round-0, round-1, ...   R_0, R_1, ...: model.safetensors, log.csv, sheets/, figures.json
  OUT/data-1, data-2, ...     the faces as R_0, R_1, ... cleaned them, each with a manifest
  OUT/control-1, ...          with --control: as many steps on the faces as they were
  OUT/table.md, table.json    what was kept, blended, rejected; all models' figures on split "val",
                              and their changes from R_0 on the same faces
  OUT/rounds.json             the settings, and which parts are finished

Every part goes on where it stopped, a finished one is not done again, other settings are refused."""


def add_parser(kinds: Any) -> None:
    t = kinds.add_parser(
        "extrinsic", help="a restorer that cleans its own training targets (IDM, extrinsic part)",
        description=_DESCRIPTION, epilog=_EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    flags.add_run(t, out="the run, see above")
    _add_rounds(t)
    _add_cleaning(t)
    _add_judging(t)
    training = t.add_argument_group("training", "of R_0; the later ones share all but the --round-... settings")
    flags.add_training(training, preset=None, said="idm-128, or that of --init-from")
    flags.add_losses(t)


def _add_rounds(t: argparse.ArgumentParser) -> None:
    d, rounds = _DEFAULTS, t.add_argument_group("rounds")
    rounds.add_argument("--rounds", type=int, default=d.rounds, help="how many times to clean (default: %(default)s)")
    rounds.add_argument("--init-from", metavar="MODEL", help="R_0 is this model, and not trained: a name or a file")
    rounds.add_argument(
        "--round-steps", type=int, default=d.round_steps, help="optimiser steps of each round (default: %(default)s)"
    )
    rounds.add_argument(
        "--round-learning-rate", type=float, default=d.round_learning_rate, help="of each round (default: %(default)s)"
    )
    rounds.add_argument("--round-min-native-px", type=int, help="as --min-native-px, of each round (default: the same)")
    rounds.add_argument(
        "--from", choices=["original", "previous"], default=d.source, dest="source",
        help="what R_r cleans: the faces of --data, or those that the round before cleaned (default: %(default)s)",
    )  # fmt: skip
    rounds.add_argument("--control", action="store_true", help="train each round on the faces as they were, too")


def _add_cleaning(t: argparse.ArgumentParser) -> None:
    d = _DEFAULTS.clean
    clean = t.add_argument_group("cleaning", "how targets are enhanced, and how far from the original one may go")
    clean.add_argument("--clean-steps", type=int, default=d.steps, help="sampling steps (default: %(default)s)")
    clean.add_argument("--clean-sampler", choices=list(SOLVERS), metavar="NAME", help="default: the model's own")
    clean.add_argument("--clean-strength", type=float, help="in (0, 1]: below 1 the walk starts nearer to the original")
    clean.add_argument("--clean-blend", type=float, default=d.blend, help="share of the enhanced (default: 1)")
    add_bounds(clean, "--clean-", d.max_identity_distance, d.max_low_frequency)
    clean.add_argument("--clean-seed", type=int, default=d.seed, help="of the noise (default: %(default)s)")
    clean.add_argument("--clean-batch-size", type=int, default=d.batch_size, help="default: %(default)s")
    clean.add_argument("--clean-dtype", choices=["fp32", "bf16", "fp16"], help="default: the device's fastest")
    clean.add_argument(
        "--clean-workers", type=int, default=_DEFAULTS.clean_workers, help="processes (default: %(default)s)"
    )


def _add_judging(t: argparse.ArgumentParser) -> None:
    d = JudgeSettings()
    judging = t.add_argument_group("judging", "may change from call to call: figures are then made again")
    judging.add_argument("--eval-data", type=Path, help="folder whose split 'val' is judged on (default: --data)")
    judging.add_argument("--eval-levels", nargs="+", choices=list(LEVELS), default=list(d.levels), help="medium")
    judging.add_argument("--eval-steps", nargs="+", type=int, default=list(d.steps), help="default: 1 4")
    judging.add_argument("--eval-limit", type=int, metavar="N", help="only the first N faces (default: all)")
    judging.add_argument("--no-eval", action="store_true", help="judge no model: cleaning and training only")


_DEFAULTS = RoundSettings(flags.DEFAULTS)


def round_settings(args: argparse.Namespace) -> RoundSettings:
    """The settings that ``args`` ask for."""
    from idm_fast.training.extrinsic import find_start  # heavy: only when training

    args.init_from, args.preset = find_start(args.init_from, args.preset)
    judge = JudgeSettings(args.eval_data, tuple(args.eval_levels), tuple(args.eval_steps), args.eval_limit)
    cleaning = {
        name: getattr(args, f"clean_{name}")
        for name in (
            "steps", "sampler", "strength", "seed", "max_identity_distance", "max_low_frequency", "blend", "batch_size",
            "dtype",
        )
    }  # fmt: skip
    return RoundSettings(
        flags.settings(args, TrainSettings, LossWeights),
        rounds=args.rounds,
        round_steps=args.round_steps,
        round_learning_rate=args.round_learning_rate,
        round_min_native_px=args.round_min_native_px,
        source=args.source,
        control=args.control,
        clean=CleanOptions(**cleaning, aligned=True),
        clean_workers=args.clean_workers,
        judge=None if args.no_eval else judge,
    )


def run(args: argparse.Namespace) -> int:
    flags.check_budget(args)
    settings = round_settings(args)
    if args.align:
        flags.align(args.data, settings.first.data)

    from idm_fast.training.extrinsic import Rounds

    Rounds(settings).run(args.budget_minutes)
    return 0
