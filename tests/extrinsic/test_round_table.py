"""The table over rounds, of made-up figures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from idm_fast.training import round_table

CONDITIONS = {
    "reference": "made-up faces", "faces": 3, "crop_px": 32, "degradation_version": 1, "seed": 0, "intervals": "none",
}  # fmt: skip


def _row(level: str, name: str, steps: int | None, fd: float | None) -> dict[str, Any]:
    metrics: dict[str, Any] = {
        key: {"mean": 0.5, "low": 0.4, "high": 0.6} for key in ("psnr", "ssim", "lpips_alex", "lpips_vgg")
    }
    metrics["recognition"] = {"mean": 0.25, "low": None, "high": None}
    metrics["fd_vgg"] = {"mean": fd, "low": None, "high": None}
    return {"level": level, "name": name, "steps": steps, "metrics": metrics}


def _figures(*rows: dict[str, Any], changes: list[dict[str, Any]] | None = None) -> dict[str, Any]:
    return {"report": {"conditions": CONDITIONS, "rows": list(rows)}, "changes": changes or []}


def _change(level: str, steps: int, fd: float | None) -> dict[str, Any]:
    row = _row(level, "", steps, fd)
    del row["name"]
    return row


DONE: dict[str, dict[str, Any]] = {
    "round-0": {"start": "given.safetensors", "steps": 0, "hours": 0.0},
    "data-1": {
        "source": "faces", "model": "round-0", "total": 10, "kept": 4, "blended": 2, "rejected": 1, "copied": 3,
        "duplicate": 0, "failed": 0,
    },
    "round-1": {"start": "round-0", "data": "data-1", "steps": 600, "hours": 0.126},
    "control-1": {"start": "round-0", "data": "faces", "steps": 600, "hours": 0.126},
}  # fmt: skip


def test_rows_that_belong_together_stand_together(tmp_path: Path) -> None:
    figures = [
        _figures(
            _row("mild", "R_0", 1, 40.0), _row("mild", "R_0", 4, 20.0), _row("mild", "degraded input", None, 90.0),
            _row("severe", "R_0", 1, 0.0), _row("severe", "R_0", 4, None),
        ),
        _figures(
            _row("mild", "R_1", 1, 30.0), _row("mild", "R_1", 4, 21.0), _row("severe", "R_1", 4, 7.0),
            changes=[_change("mild", 1, -25.0), _change("severe", 4, None)],
        ),
        _figures(_row("mild", "control 1", 1, 38.0), changes=[_change("mild", 1, -5.0)]),
    ]  # fmt: skip
    round_table.write_table(tmp_path, DONE, figures)
    document = json.loads((tmp_path / "table.json").read_text())
    assert [(row["level"], row["steps"], row["name"]) for row in document["rows"]] == [
        ("mild", None, "degraded input"),
        ("mild", 1, "R_0"),
        ("mild", 1, "R_1"),
        ("mild", 1, "control 1"),
        ("mild", 4, "R_0"),
        ("mild", 4, "R_1"),
        ("severe", 1, "R_0"),
        ("severe", 4, "R_0"),
        ("severe", 4, "R_1"),
    ]
    assert [(row["level"], row["steps"], row["name"]) for row in document["changes"]] == [
        ("mild", 1, "R_1"),
        ("mild", 1, "control 1"),
        ("severe", 4, "R_1"),
    ]
    assert document["parts"] == DONE
    text = (tmp_path / "table.md").read_text()
    assert "| D_1 | faces by round-0 | 10 | 4 | 2 | 1 | 3 | 0 | 0 |\n" in text
    assert "| R_0 | given.safetensors | - | 0 | 0.00 |\n" in text
    assert "| control 1 | round-0 | faces | 600 | 0.13 |\n" in text
    assert "Reference set: made-up faces, N = 3, 32 px crops" in text
    half, more = "0.500 [0.400, 0.600]", "+0.500 [+0.400, +0.600]"
    psnr = "0.50 [0.40, 0.60]"
    assert f"| mild | 1 | R_1 | {psnr} | {half} | {half} | {half} | 0.250 [-, -] | 30.0 [-, -] |\n" in text
    psnr = "+0.50 [+0.40, +0.60]"
    assert f"| mild | 1 | R_1 | {psnr} | {more} | {more} | {more} | +0.250 [-, -] | -25.0 [-, -] |\n" in text
    assert f"| severe | 4 | R_1 | {psnr} | {more} | {more} | {more} | +0.250 [-, -] | - [-, -] |\n" in text
    for table in text.split("\n\n"):
        lines = [line for line in table.strip().splitlines() if line.startswith("|")]
        assert len({line.count("|") for line in lines}) <= 1  # every row has its heading's columns


def test_without_figures_the_parts_are_told_of(tmp_path: Path) -> None:
    round_table.write_table(tmp_path, DONE, [])
    text = (tmp_path / "table.md").read_text()
    assert "| R_1 | round-0 | data-1 | 600 | 0.13 |" in text
    assert "PSNR" not in text
