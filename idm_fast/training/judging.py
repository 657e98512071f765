"""Judges the model of every round on the same degraded faces, and against R_0 face by face.

Every model is judged in float32 on split "val" of the same pictures, whose targets no round has cleaned, with the same
degradations and noise. So models differ in their answers alone, and the mean of the differences is known far better
than the difference of the means.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from idm_fast.crops import SampleSettings
from idm_fast.errors import IdmFastError
from idm_fast.evaluation.changes import changes
from idm_fast.evaluation.metrics import Estimate, FaceMetrics
from idm_fast.evaluation.parts import Part, Parts
from idm_fast.evaluation.report import CLEAN, FD, Subject, evaluate
from idm_fast.files import atomic
from idm_fast.registry import Target, load_models
from idm_fast.training.data import FaceFile, fingerprint, list_faces, load_crop
from idm_fast.training.degradation import DEGRADATION_VERSION
from idm_fast.training.rounds import JudgeSettings, digest

# "key": what was judged and how; "report": Report.as_json(); "values": checksum of the figures face by face;
# "changes": rows of estimates of the change from R_0 (FD-VGG: in percent)
Figures = dict[str, Any]
FIGURES, VALUES = "figures.json", "values.safetensors"
_SEED = 0


def check(settings: JudgeSettings, own: Path) -> None:
    """Raises ``IdmFastError`` when there is nothing to judge on, or a network of the metrics is not installed.

    ``own``: the run's data, which is judged on unless ``settings`` name other. So everywhere below.
    """
    _faces(settings, own)
    FaceMetrics()


def _faces(settings: JudgeSettings, own: Path) -> list[FaceFile]:
    try:
        return list_faces(settings.data or own, "val")[: settings.limit]
    except IdmFastError as error:
        raise IdmFastError(f"{error}; models are judged on these (--eval-data: others, --no-eval: none)") from None


def key(settings: JudgeSettings, own: Path, model: str, first: str | None) -> dict[str, Any]:
    """What figures depend on: they are good for as long as this stays the same.

    ``model``, ``first``: checksums of the model and of R_0 (None where that is the model).
    """
    return {
        "model": model,
        "compared_with": first,
        **fingerprint(_faces(settings, own), settings.data or own),
        "levels": list(settings.levels),
        "steps": list(settings.steps),
        "degradation_version": DEGRADATION_VERSION,
    }


def read(folder: Path, expected: dict[str, Any]) -> Figures | None:
    """The figures in ``folder`` if they were made of what ``expected`` says; None where there are none, or others."""
    try:
        figures = json.loads((folder / FIGURES).read_text())
        known = {name: expected[name] for name in figures["key"]}  # what it did not know of yet is not compared
        whole = figures["key"] == known and figures["values"] == digest(folder / VALUES)
        return figures if whole and figures["report"]["rows"] else None
    except (OSError, ValueError, TypeError, KeyError):
        return None  # they are made again: nothing else depends on them


class _Recorded(Parts):
    """Batches that are finished stay on disk, so that judging goes on where it stopped; all are remembered."""

    def __init__(self, folder: Path, settings: dict[str, Any]) -> None:
        super().__init__(folder, settings)
        self.seen: list[Part] = []

    def get_or(self, name: str, make: Callable[[], Part]) -> Part:
        self.seen.append(super().get_or(name, make))
        return self.seen[-1]

    def joined(self) -> Part:
        return {key: torch.cat([part[key] for part in self.seen]) for key in self.seen[0]}


def judge(
    folder: Path,
    name: str,
    settings: JudgeSettings,
    own: Path,
    wanted: dict[str, Any],
    *,
    device: torch.device,
    first: Path | None = None,
    between: Callable[[], None] = lambda: None,
) -> None:
    """Writes ``FIGURES`` and ``VALUES`` of ``folder / model.safetensors``, called ``name``.

    ``wanted``: their ``key``. ``first``: the folder of R_0 with its figures, for the changes from it; without it the
    degraded input is judged too. ``between`` is called after every batch, and may raise: what is judged so far is
    kept for the next call.
    """
    (restorer,) = load_models(folder / "model.safetensors", Target(str(device), "fp32"))
    faces, data = _faces(settings, own), settings.data or own

    def subject(steps: int) -> Subject:
        return Subject(name, lambda y, seeds: restorer.restore(y, seeds, SampleSettings(steps)), steps)

    subjects = [subject(steps) for steps in settings.steps]
    if first is None:
        subjects.append(Subject("degraded input", lambda y, seeds: y))
    parts = _parts(folder, wanted)
    with tqdm(total=len(faces), unit="face", disable=None) as bar:

        def progress(done: int) -> None:
            bar.update(done - bar.n)
            if done < len(faces):
                between()

        report = evaluate(
            (load_crop(face.path, restorer.size) for face in faces),
            subjects,
            FaceMetrics(device),
            levels=settings.levels,
            reference=f"clean crops of split 'val' of {data.name}",
            seed=_SEED,
            device=device,
            progress=progress,
            parts=parts,
        )
    values = _values(parts.joined(), settings)
    changes = [] if first is None else _changes(values, load_values(first), settings)
    with atomic(folder / VALUES) as temporary:
        save_file(values, temporary)
    figures = {"key": wanted, "report": report.as_json(), "values": digest(folder / VALUES), "changes": changes}
    write_json(folder / FIGURES, figures)
    parts.remove()


def _parts(folder: Path, wanted: dict[str, Any]) -> _Recorded:
    own = folder / f"judging-{hashlib.sha256(json.dumps(wanted).encode()).hexdigest()[:12]}"
    for other in folder.glob("judging-*"):
        if other != own:  # of an earlier call that asked for something else
            shutil.rmtree(other)
    return _Recorded(own, wanted)


def _values(part: Part, settings: JudgeSettings) -> dict[str, Tensor]:
    """The model's figures face by face by "level/steps/metric", and the clean faces' features; [N] and [N, D]."""
    values = {f"clean/{FD}": part[f"{CLEAN}/{FD}"]}
    for level in settings.levels:
        for index, steps in enumerate(settings.steps):
            prefix = f"{level}/{index}/"
            found = {name.removeprefix(prefix): tensor for name, tensor in part.items() if name.startswith(prefix)}
            values |= {f"{level}/{steps}/{name}": tensor for name, tensor in found.items()}
    return {name: tensor.contiguous() for name, tensor in values.items()}


def load_values(folder: Path) -> dict[str, Tensor]:
    try:
        return load_file(folder / VALUES)
    except (OSError, SafetensorError) as error:
        raise IdmFastError(f"{folder / VALUES}: must be the figures face by face, got {error}") from None


def _changes(now: dict[str, Tensor], before: dict[str, Tensor], settings: JudgeSettings) -> list[dict[str, Any]]:
    """Estimates of the change between two models, over the same faces; of FD-VGG in percent."""

    def of(values: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
        return {name.removeprefix(prefix): value for name, value in values.items() if name.startswith(prefix)}

    rows = []
    for level in settings.levels:
        for steps in settings.steps:
            prefix = f"{level}/{steps}/"
            found = changes(of(now, prefix), of(before, prefix), of(now, "clean/"), _SEED)
            metrics = {name: _plain(estimate) for name, estimate in found.items()}
            rows.append({"level": level, "steps": steps, "metrics": metrics})
    return rows


def _plain(estimate: Estimate) -> dict[str, float | None]:
    return {name: value if math.isfinite(value) else None for name, value in asdict(estimate).items()}


def write_json(path: Path, document: dict[str, Any]) -> None:
    with atomic(path) as temporary:
        temporary.write_text(json.dumps(document, indent=1) + "\n")
