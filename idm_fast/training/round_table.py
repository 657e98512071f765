"""Judges the model of every round on the same degraded faces, and sets the figures side by side.

Every model is judged in float32 on split "val" of the same pictures, whose targets no round has cleaned, with the same
degradations and noise, so that rows differ by the model alone.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from idm_fast.crops import SampleSettings
from idm_fast.errors import IdmFastError
from idm_fast.evaluation.metrics import FaceMetrics
from idm_fast.evaluation.report import FD, HEADINGS, Subject, evaluate
from idm_fast.files import atomic
from idm_fast.registry import Target, load_models
from idm_fast.training.data import FaceFile, list_faces, load_crop
from idm_fast.training.degradation import DEGRADATION_VERSION
from idm_fast.training.rounds import JudgeSettings, fingerprint

Figures = dict[str, Any]  # {"key": what was judged and how, "report": Report.as_json()}

COUNTS = ("total", "kept", "blended", "rejected", "copied", "duplicate", "failed")
_DIGITS = {"psnr": 2, FD: 1}


def check(judge: JudgeSettings, own: Path) -> None:
    """Raises ``IdmFastError`` when there is nothing to judge on, or a network of the metrics is not installed."""
    _faces(judge, own)
    FaceMetrics()


def _faces(judge: JudgeSettings, own: Path) -> list[FaceFile]:
    folder = judge.data or own
    try:
        return list_faces(folder, "val")[: judge.limit]
    except IdmFastError as error:
        raise IdmFastError(f"{error}; models are judged on these") from None


def key(judge: JudgeSettings, own: Path, sha256: str) -> dict[str, Any]:
    """What figures depend on: they are good for as long as this stays the same."""
    return {
        "model": sha256,
        "faces": fingerprint(_faces(judge, own), judge.data or own),
        "levels": list(judge.levels),
        "steps": list(judge.steps),
        "degradation_version": DEGRADATION_VERSION,
    }


def judge(
    model: Path, name: str, settings: JudgeSettings, own: Path, sha256: str, device: torch.device, with_input: bool
) -> Figures:
    """Figures of the weights file ``model``, called ``name``; ``with_input``: of the degraded input too.

    ``own``: the run's data, unless ``settings`` name other; ``sha256``: of the file.
    """
    (restorer,) = load_models(model, Target(str(device), "fp32"))
    faces, folder = _faces(settings, own), settings.data or own

    def subject(steps: int) -> Subject:
        return Subject(name, lambda y, seeds: restorer.restore(y, seeds, SampleSettings(steps)), steps)

    subjects = [subject(steps) for steps in settings.steps]
    if with_input:
        subjects.insert(0, Subject("degraded input", lambda y, seeds: y))
    with tqdm(total=len(faces), unit="face", disable=None) as bar:
        report = evaluate(
            (load_crop(face.path, restorer.size) for face in faces),
            subjects,
            FaceMetrics(device),
            levels=settings.levels,
            reference=f"clean crops of split 'val' of {folder.name}",
            device=device,
            progress=lambda count: bar.update(count - bar.n),
        )
    return {"key": key(settings, own, sha256), "report": report.as_json()}


def read(path: Path, expected: dict[str, Any]) -> Figures | None:
    """Figures in ``path`` that were made of what ``expected`` says; None where there are none, or others."""
    try:
        figures = json.loads(path.read_text())
        return figures if figures["key"] == expected and figures["report"]["rows"] else None
    except (OSError, ValueError, TypeError, KeyError):
        return None  # they are made again: nothing depends on them


def write(path: Path, document: dict[str, Any]) -> None:
    with atomic(path) as temporary:
        temporary.write_text(json.dumps(document, indent=1) + "\n")


def write_table(out: Path, done: dict[str, dict[str, Any]], figures: list[Figures]) -> None:
    """``table.md`` and ``table.json`` in ``out``: what each finished part (``done``) ended with, and all figures."""
    rows = _rows(figures)
    conditions = figures[0]["report"]["conditions"] if figures else {}
    write(out / "table.json", {"conditions": conditions, "parts": done, "rows": rows})
    tables = [_cleaning(done), _training(done), _quality(conditions, rows)]
    with atomic(out / "table.md") as temporary:
        temporary.write_text("\n".join("\n".join(lines) + "\n" for lines in tables if lines))


def _rows(figures: list[Figures]) -> list[dict[str, Any]]:
    """All rows, those that are to be compared together: by level, then by steps, then in the order of the rounds.

    ``fd_vgg_change``: of FD-VGG from R_0's in percent, None where there is none to compare with.
    """
    rows = [row for each in figures for row in each["report"]["rows"]]
    levels = list(dict.fromkeys(row["level"] for row in rows))
    first = {(row["level"], row["steps"]): row["metrics"][FD]["mean"] for row in reversed(rows) if row["steps"]}
    for row in rows:
        before, now = first.get((row["level"], row["steps"])), row["metrics"][FD]["mean"]
        row["fd_vgg_change"] = 100 * (now / before - 1) if before and now is not None else None
    return sorted(rows, key=lambda row: (levels.index(row["level"]), row["steps"] or 0))


def _cleaning(done: dict[str, dict[str, Any]]) -> list[str]:
    rows = [
        f"| D_{name.removeprefix('data-')} | {facts['source']} by {facts['model']} | "
        + " | ".join(str(facts[count]) for count in COUNTS)
        + " |"
        for name, facts in done.items()
        if name.startswith("data-")
    ]
    if not rows:
        return []
    head = "| targets | cleaned | pictures | " + " | ".join(COUNTS[1:]) + " |"
    return ["Pictures (copied: of other splits than train):", "", head, "|---|---|" + "--:|" * len(COUNTS), *rows]


def _training(done: dict[str, dict[str, Any]]) -> list[str]:
    rows = [
        f"| {label(name)} | {facts['start'] or '-'} | {facts.get('data', '-')} | {facts['steps']} | "
        f"{facts['hours']:.2f} |"
        for name, facts in done.items()
        if not name.startswith("data-")
    ]
    return ["Trainings:", "", "| model | begun from | targets | steps | hours |", "|---|---|---|--:|--:|", *rows]


def _quality(conditions: dict[str, Any], rows: list[dict[str, Any]]) -> list[str]:
    if not rows:
        return []
    c = conditions
    return [
        f"Reference set: {c['reference']}, N = {c['faces']}, {c['crop_px']} px crops, networks in float32. "
        f"Degradation version {c['degradation_version']}, seed {c['seed']}. 95 % intervals: {c['intervals']}.",
        "",
        "| level | steps | what | " + " | ".join(HEADINGS.values()) + " | FD-VGG to R_0 |",
        "|---|--:|---|" + "--:|" * (len(HEADINGS) + 1),
        *(
            f"| {row['level']} | {row['steps'] or '-'} | {row['name']} | "
            + " | ".join(_cell(row["metrics"][name], _DIGITS.get(name, 3)) for name in HEADINGS)
            + f" | {_percent(row['fd_vgg_change'])} |"
            for row in rows
        ),
    ]


def label(name: str) -> str:
    """What the model of the folder ``name`` is called: round-1 holds R_1."""
    kind, _, number = name.partition("-")
    return f"R_{number}" if kind == "round" else f"control {number}"


def _cell(estimate: dict[str, float | None], digits: int) -> str:
    mean, low, high = ("-" if value is None else f"{value:.{digits}f}" for value in estimate.values())
    return f"{mean} [{low}, {high}]"


def _percent(change: float | None) -> str:
    return "-" if change is None else f"{change:+.1f} %"
