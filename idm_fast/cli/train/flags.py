"""The flags that every kind of training shares, and what becomes of them."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, get_args, get_type_hints

from tqdm import tqdm

from idm_fast.config import PRESETS
from idm_fast.errors import IdmFastError
from idm_fast.training.losses import LossWeights
from idm_fast.training.settings import RunSettings, TrainSettings

if TYPE_CHECKING:
    from idm_fast.training.loop import Loop  # heavy: only when training

_NUMBERS = {
    "steps": "optimiser steps of the whole run",
    "batch_size": "faces a step and process",
    "learning_rate": "AdamW's, after warm-up",
    "warmup": "steps of rising learning rate",
    "decay_fraction": "last part of the run with falling learning rate",
    "weight_decay": "AdamW's",
    "grad_clip": "largest gradient norm",
    "ema_decay": "of the averaged weights",
    "pure_noise": "share of items that start from pure noise",
    "rollout": "share of items that refine the model's own answer",
    "degraded": "share of items that are degraded faces",
    "codebook_lead": "first steps, in which latents are not quantised",
    "codebook_decay": "of the running means that the codes are",
    "revive_below": "a code chosen less often than this share of the mean is dead",
    "euclid": "weight of the squared distance beside 1 - cos",
    "guidance_scale": "how far a step of guidance goes at most, in deviations of the latent",
    "guidance_every": "evaluations between two gradients",
    "guidance_repeats": "steps, each along a gradient of its own, at a guided evaluation",
    "revive_every": "steps between moving the dead codes",
    "min_native_px": "leave out crops enlarged from fewer pixels",
    "snr_min": "smallest weight of an item's loss",
    "snr_max": "largest weight of an item's loss",
    "val_faces": "validation faces of the figures beside each sheet",
    "seed": "of everything random",
    "workers": "data loading processes",
    "save_every": "steps between states",
    "sheet_every": "steps between sheets",
}
Weights = TypeVar("Weights")
Settings = TypeVar("Settings", bound=RunSettings)
DEFAULTS = TrainSettings(Path(), Path())
_ALIGNED_PX = 256  # side of the crops that --align makes: the largest trainable preset's


def add_run(t: argparse.ArgumentParser, out: str) -> None:
    """Where a run reads and writes, and when it stops. ``out`` says what the run's folder holds."""
    t.add_argument("--data", type=Path, required=True, help="aligned crops with faces.csv, or any folder of such crops")
    t.add_argument("--out", type=Path, required=True, help=out)
    t.add_argument(
        "--align", action="store_true", help="--data holds photographs: first cut the faces out to OUT/aligned"
    )
    t.add_argument("--budget-minutes", type=float, help="stop after this time, state kept")
    # Not a default: the verb's own --debug, before KIND, would be overwritten by it.
    t.add_argument("--debug", action="store_true", default=argparse.SUPPRESS, help="show the traceback of an error")


def add_training(
    t: argparse._ActionsContainer, preset: str | None = DEFAULTS.preset, said: str = "%(default)s"
) -> None:
    """The settings of one training loop. ``preset``: the default one; ``said``: how --help says it."""
    presets = [
        name for name, c in sorted(PRESETS.items()) if c.unet.cond_channels == 3 and c.diffusion.prediction == "x0"
    ]
    t.add_argument("--preset", default=preset, choices=presets, help=f"network to train (default: {said})")
    add_numbers(t, DEFAULTS)


def add_numbers(t: argparse._ActionsContainer, defaults: RunSettings) -> None:
    """The numbers that settings of the kind of ``defaults`` have, and the precision."""
    for name, text in _NUMBERS.items():
        if hasattr(defaults, name):
            value = getattr(defaults, name)
            flag = f"--{name.replace('_', '-')}"
            t.add_argument(flag, type=type(value), default=value, help=f"{text} (default: {value})")
    precision = defaults.precision
    t.add_argument("--precision", choices=["fp32", "bf16", "fp16"], default=precision, help="default: %(default)s")


def add_losses(t: argparse.ArgumentParser, weights: type[Any] = LossWeights) -> None:
    losses = t.add_argument_group("loss", "weights of its terms (0 leaves one out), and their settings")
    for name, hint in get_type_hints(weights).items():
        flag, default = f"--loss-{name.replace('_', '-')}", getattr(weights, name)
        words = get_args(hint) or None  # a Literal's
        losses.add_argument(flag, type=type(default), default=default, choices=words, help=f"default: {default}")


def losses(args: argparse.Namespace, weights: type[Weights]) -> Weights:
    """The ``weights`` that ``add_losses`` asked for."""
    return weights(**{name: getattr(args, f"loss_{name}") for name in get_type_hints(weights)})


def check_budget(args: argparse.Namespace) -> None:
    if args.budget_minutes is not None and not args.budget_minutes > 0:
        raise IdmFastError(f"--budget-minutes must be > 0, got {args.budget_minutes}")


def settings(args: argparse.Namespace, kind: type[Settings], weights: type[Any] | None = None) -> Settings:
    """The ``kind`` of settings that ``args`` ask for, with ``weights`` of its loss where it has such.

    With --align the faces are those that will be cut out, which comes after: wrong settings should not cost that time.
    """
    check_budget(args)
    values = {item.name: getattr(args, item.name) for item in fields(kind) if hasattr(args, item.name)}
    if weights is not None:
        values["loss"] = losses(args, weights)
    if args.align:
        values["data"] = args.out / "aligned"
    return kind(**values)


def train(args: argparse.Namespace, settings: Settings, trainer: Callable[[Settings], Loop[Any, Any]]) -> int:
    """Cuts the faces out where --align asks for it, and trains."""
    if args.align:
        align(args.data, settings.data)
    trainer(settings).run(args.budget_minutes)
    return 0


def align(photographs: Path, crops: Path) -> None:
    """Cuts the faces of ``photographs`` out to the folder ``crops``, which may be half done; in one process only."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise IdmFastError(
            "--align must run in one process, got one of several; align once without torchrun (a short "
            f"--budget-minutes will do), then train with --data {crops}"
        )
    from idm_fast.faces.dataset import AlignReport, align_folder  # needs the detector

    with tqdm(unit="photograph", file=sys.stderr, disable=None) as bar:

        def progress(done: int, total: int, report: AlignReport) -> None:
            bar.total = total
            bar.set_postfix_str(f"{report.crops} faces")
            bar.update(done - bar.n)

        report = align_folder(photographs, crops, size=_ALIGNED_PX, progress=progress)
    print(
        f"{crops}: {report.crops} faces from {report.photographs} photographs, {report.skipped} unreadable, "
        f"{report.resumed} done before",
        file=sys.stderr,
    )
