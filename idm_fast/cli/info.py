"""idm-fast info: what a model file is."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from idm_fast.checkpoints import native
from idm_fast.registry import find_files, shipped


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = "Prints a model's settings and how it was made; of a family (idm-face), those of each model."
    parser.add_argument(
        "model", nargs="?", help="a family, a shipped model's name or a .safetensors file (default: list the shipped)"
    )
    parser.add_argument("--json", action="store_true", help='print one JSON document, {"models": [...]}')


def run(args: argparse.Namespace) -> int:
    if args.model is None:
        print(json.dumps({"models": shipped()}) if args.json else "\n".join(shipped()) or "no model is shipped")
        return 0
    models = [describe(file) for file in find_files(args.model)]
    if args.json:
        print(json.dumps({"models": models}, indent=1))
        return 0
    for said in models:
        name, millions, megabytes = said["config"]["name"], said["parameters"] / 1e6, said["bytes"] / 1e6
        print(f"{name}: {millions:.2f} M parameters, {megabytes:.1f} MB, {said['file']}")
        for group in ("config", "notes"):
            print(f"{group}: {json.dumps(said[group], indent=2)}")
    return 0


def describe(file: Path) -> dict[str, Any]:
    """A model file as plain data. Raises ``IdmFastError`` for one that is missing or broken."""
    checkpoint = native.load(file)
    count = sum(parameter.numel() for parameter in checkpoint.module.parameters())
    said: dict[str, Any] = {"file": str(file), "bytes": file.stat().st_size, "parameters": count}
    return said | {"config": checkpoint.config.to_dict(), "notes": checkpoint.notes}
