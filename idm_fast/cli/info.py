"""idm-fast info: what a model file is."""

from __future__ import annotations

import argparse
import json
from typing import Any

from idm_fast.checkpoints import describe
from idm_fast.checkpoints.settings import from_pairs
from idm_fast.cli.convert import add_reading_arguments
from idm_fast.registry import find_files, shipped


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = """Prints what a model file is: its settings, how it was made, and of another project's
file what its keys do not tell. Nothing in it is run. Of a family (idm-face), each model."""
    parser.add_argument(
        "model",
        nargs="?",
        help="a family, a shipped model's name, a weights file or a diffusers folder (default: list the shipped)",
    )
    add_reading_arguments(parser)
    parser.add_argument("--json", action="store_true", help='print one JSON document, {"models": [...]}')


def run(args: argparse.Namespace) -> int:
    if args.model is None:
        print(json.dumps({"models": shipped()}) if args.json else "\n".join(shipped()) or "no model is shipped")
        return 0
    settings = from_pairs(args.set)
    models = [describe(file, settings, args.format, averaged=args.ema) for file in find_files(args.model)]
    print(json.dumps({"models": models}, indent=1) if args.json else "\n".join(as_text(said) for said in models))
    return 0


def as_text(said: dict[str, Any]) -> str:
    name, millions, megabytes = said["config"].get("name", said["kind"]), said["parameters"] / 1e6, said["bytes"] / 1e6
    lines = [
        f"{name}: {millions:.2f} M parameters, {megabytes:.1f} MB, {said['file']}",
        f"format: {said['format']}, {said['family']}",
    ]
    for group in ("config", "notes", "source", "license"):
        if said[group]:
            lines.append(f"{group}: {json.dumps(said[group], indent=2)}")
    if said["missing"]:
        lines.append("not told by the file (change with --set KEY=VALUE):")
    for missing in said["missing"]:
        value = "must be given" if missing["assumed"] is None else json.dumps(missing["assumed"])
        lines.append(f"  {missing['name']} = {value}  ({missing['allowed']}): {missing['decides']}")
    return "\n".join(lines)
