"""The table over rounds: what cleaning did, what was trained on what, how good each model is and how it differs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from idm_fast.evaluation.report import FD, HEADINGS
from idm_fast.files import atomic
from idm_fast.training.judging import Figures, write_json

COUNTS = ("total", "kept", "blended", "rejected", "copied", "duplicate", "failed")
_DIGITS = {"psnr": 2, FD: 1}


def write_table(out: Path, done: dict[str, dict[str, Any]], figures: list[Figures]) -> None:
    """``table.md`` and ``table.json`` in ``out``: what each finished part (``done``) ended with, and all figures."""
    rows = _sorted([row for each in figures for row in each["report"]["rows"]])
    names = [each["report"]["rows"][0]["name"] for each in figures]
    changes = _sorted(
        [row | {"name": name} for name, each in zip(names, figures, strict=True) for row in each["changes"]]
    )
    conditions = figures[0]["report"]["conditions"] if figures else {}
    write_json(out / "table.json", {"conditions": conditions, "parts": done, "rows": rows, "changes": changes})
    tables = [_cleaning(done), _training(done), _quality(conditions, rows), _change(changes)]
    with atomic(out / "table.md") as temporary:
        temporary.write_text("\n".join("\n".join(lines) + "\n" for lines in tables if lines))


def _sorted(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Those that are to be compared together: by level, then by steps, then in the order of the rounds."""
    levels = list(dict.fromkeys(row["level"] for row in rows))
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
        *_head(HEADINGS),
        *(_line(row, {key: _cell(row["metrics"][key], _DIGITS.get(key, 3)) for key in HEADINGS}) for row in rows),
    ]


def _change(rows: list[dict[str, Any]]) -> list[str]:
    if not rows:
        return []
    return [
        "Change from R_0 on the same faces (95 % intervals of the mean difference; FD-VGG: of its change in percent, "
        "jackknife):",
        "",
        *_head(HEADINGS | {FD: "FD-VGG % ↓"}),
        *(_line(row, {key: _cell(row["metrics"][key], _DIGITS.get(key, 3), "+") for key in HEADINGS}) for row in rows),
    ]


def _head(headings: dict[str, str]) -> list[str]:
    return [
        "| level | steps | what | " + " | ".join(headings.values()) + " |",
        "|---|--:|---|" + "--:|" * len(headings),
    ]


def _line(row: dict[str, Any], cells: dict[str, str]) -> str:
    return f"| {row['level']} | {row['steps'] or '-'} | {row['name']} | " + " | ".join(cells.values()) + " |"


def label(name: str) -> str:
    """What the model of the folder ``name`` is called: round-1 holds R_1."""
    kind, _, number = name.partition("-")
    return f"R_{number}" if kind == "round" else f"control {number}"


def _cell(estimate: dict[str, float | None], digits: int, sign: str = "") -> str:
    mean, low, high = (
        "-" if estimate[name] is None else f"{estimate[name]:{sign}.{digits}f}" for name in ("mean", "low", "high")
    )
    return f"{mean} [{low}, {high}]"
