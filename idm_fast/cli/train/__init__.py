"""idm-fast train: makes a model from a folder of faces. One file a kind, each with ``add_parser`` and ``run``."""

from __future__ import annotations

import argparse
from typing import Any

from idm_fast.cli.train import extrinsic, generator, identity, intrinsic, latent_mask, latent_prior, vqgan

_KINDS = {
    "intrinsic": intrinsic,
    "extrinsic": extrinsic,
    "generator": generator,
    "vqgan": vqgan,
    "latent-prior": latent_prior,
    "identity": identity,
    "latent-mask": latent_mask,
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = "Trains a model. The run's folder keeps its state."
    kinds: Any = parser.add_subparsers(dest="kind", required=True, metavar="KIND")
    for kind in _KINDS.values():
        kind.add_parser(kinds)


def run(args: argparse.Namespace) -> int:
    return int(_KINDS[args.kind].run(args))
