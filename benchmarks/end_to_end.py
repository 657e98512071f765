"""Times what a user waits for: one aligned face at several numbers of steps, and a whole photograph.

    python benchmarks/end_to_end.py --photo group.jpg --json out.json

Wall clock, medians with the 20th and 80th percentile, after one warm-up. Absolute times hold for this machine only.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from idm_fast.errors import IdmFastError
from idm_fast.evaluation.environment import environment
from idm_fast.files import atomic
from idm_fast.images import read_image
from idm_fast.registry import DEFAULT_MODEL
from idm_fast.restorer import Restorer


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=DEFAULT_MODEL, help="default: %(default)s")
    parser.add_argument("--steps", nargs="+", type=int, default=[1, 2, 4, 8])
    parser.add_argument("--repeats", type=int, default=7, help="timed runs of each row (default: %(default)s)")
    parser.add_argument("--photo", type=Path, action="append", default=[], help="photographs to time whole")
    parser.add_argument("--json", type=Path, help="results file to write")
    return parser.parse_args(arguments)


def timed(run: Callable[[], Any], repeats: int) -> dict[str, float]:
    """Milliseconds of ``run``: median, p20 and p80."""
    run()
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        run()
        times.append(1000 * (time.perf_counter() - started))
    low, high = np.percentile(times, [20, 80])
    return {"ms": round(statistics.median(times), 1), "p20": round(float(low), 1), "p80": round(float(high), 1)}


def rows(options: argparse.Namespace) -> list[dict[str, Any]]:
    restorer = Restorer.from_pretrained(options.model)
    found: list[dict[str, Any]] = []
    for model in restorer.models:
        noise = np.random.default_rng(0).random((model.size, model.size, 3)).astype(np.float32)
        alone = Restorer([model])
        for steps in options.steps:
            figures = timed(lambda: alone.restore(noise, aligned=True, num_inference_steps=steps), options.repeats)  # noqa: B023
            found.append({"name": "aligned face", "model": model.config.name, "steps": steps, "faces": 1} | figures)
    for photo in options.photo:
        picture = read_image(photo)
        faces = len(restorer.restore(picture, num_inference_steps=1).faces)
        figures = timed(lambda: restorer.restore(picture), max(3, options.repeats // 2))  # noqa: B023
        found.append({"name": photo.name, "model": options.model, "steps": "default", "faces": faces} | figures)
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    try:
        measured = rows(options)
        document = {"machine": environment() | {"threads": torch.get_num_threads()}, "rows": measured}
        if options.json:
            with atomic(options.json) as path:
                path.write_text(json.dumps(document, indent=1) + "\n")
    except IdmFastError as error:
        print(f"end_to_end: {error}", file=sys.stderr)
        return 2
    print("| what | model | steps | faces | ms (p20 - p80) |\n|---|---|--:|--:|--:|")
    for row in measured:
        print(
            f"| {row['name']} | {row['model']} | {row['steps']} | {row['faces']} "
            f"| {row['ms']} ({row['p20']} - {row['p80']}) |"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
