"""The table over rounds: its arithmetic on made-up figures, and real figures of models that have learnt nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from idm_fast.errors import IdmFastError
from idm_fast.evaluation.metrics import FaceMetrics
from idm_fast.training import round_table
from idm_fast.training.rounds import JudgeSettings, digest

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


def _figures(*rows: dict[str, Any]) -> dict[str, Any]:
    return {"report": {"conditions": CONDITIONS, "rows": list(rows)}}


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
            _row("mild", "degraded input", None, 90.0), _row("mild", "R_0", 1, 40.0), _row("mild", "R_0", 4, 20.0),
            _row("severe", "degraded input", None, 99.0), _row("severe", "R_0", 1, 0.0), _row("severe", "R_0", 4, None),
        ),
        _figures(
            _row("mild", "R_1", 1, 30.0), _row("mild", "R_1", 4, 21.0), _row("severe", "R_1", 1, 5.0),
            _row("severe", "R_1", 4, 7.0),
        ),
        _figures(_row("mild", "control 1", 1, 38.0)),
    ]  # fmt: skip
    round_table.write_table(tmp_path, DONE, figures)
    document = json.loads((tmp_path / "table.json").read_text())
    assert [(row["level"], row["steps"], row["name"], row["fd_vgg_change"]) for row in document["rows"]] == [
        ("mild", None, "degraded input", None),
        ("mild", 1, "R_0", 0.0),
        ("mild", 1, "R_1", pytest.approx(-25.0)),
        ("mild", 1, "control 1", pytest.approx(-5.0)),
        ("mild", 4, "R_0", 0.0),
        ("mild", 4, "R_1", pytest.approx(5.0)),
        ("severe", None, "degraded input", None),
        ("severe", 1, "R_0", None),  # of nothing no share can be taken
        ("severe", 1, "R_1", None),
        ("severe", 4, "R_0", None),
        ("severe", 4, "R_1", None),
    ]
    assert document["parts"] == DONE
    text = (tmp_path / "table.md").read_text()
    assert "| D_1 | faces by round-0 | 10 | 4 | 2 | 1 | 3 | 0 | 0 |\n" in text
    assert "| R_0 | given.safetensors | - | 0 | 0.00 |\n" in text
    assert "| control 1 | round-0 | faces | 600 | 0.13 |\n" in text
    assert "Reference set: made-up faces, N = 3, 32 px crops" in text
    half = "0.500 [0.400, 0.600]"
    assert (
        f"| mild | 1 | R_1 | 0.50 [0.40, 0.60] | {half} | {half} | {half} | 0.250 [-, -] | 30.0 [-, -] | -25.0 % |\n"
    ) in text
    for table in text.split("\n\n"):
        lines = [line for line in table.strip().splitlines() if line.startswith("|")]
        assert len({line.count("|") for line in lines}) <= 1  # every row has its heading's columns


def test_without_figures_the_parts_are_told_of(tmp_path: Path) -> None:
    round_table.write_table(tmp_path, DONE, [])
    text = (tmp_path / "table.md").read_text()
    assert "| R_1 | round-0 | data-1 | 600 | 0.13 |" in text
    assert "PSNR" not in text


@pytest.fixture
def faces(tmp_path: Path) -> Path:
    folder = tmp_path / "faces"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i in range(4):
        coarse = Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8))
        coarse.resize((48, 48), Image.Resampling.BICUBIC).save(folder / f"{i}.png")
    rows = [f"{i}.png,{'train' if i < 1 else 'val'},200\n" for i in range(4)]
    (folder / "faces.csv").write_text("file,split,native_px\n" + "".join(rows))
    return folder


@pytest.fixture(scope="module")
def _metrics() -> None:
    try:
        FaceMetrics()
    except IdmFastError as error:
        pytest.skip(str(error))


@pytest.mark.usefixtures("_metrics")
def test_a_model_is_judged_on_the_first_faces(faces: Path, tiny_model: Path, tmp_path: Path) -> None:
    settings = JudgeSettings(levels=("mild", "severe"), steps=(1, 2), limit=2)
    round_table.check(settings, faces)
    sha256 = digest(tiny_model)
    figures = round_table.judge(tiny_model, "R_0", settings, faces, sha256, torch.device("cpu"), with_input=True)
    rows = figures["report"]["rows"]
    assert [(row["level"], row["name"], row["steps"]) for row in rows] == [
        (level, name, steps)
        for level in ("mild", "severe")
        for name, steps in (("degraded input", None), ("R_0", 1), ("R_0", 2))
    ]
    assert figures["report"]["conditions"]["faces"] == 2
    assert figures["report"]["conditions"]["crop_px"] == 32
    assert rows[0]["metrics"]["psnr"]["mean"] > rows[3]["metrics"]["psnr"]["mean"]

    path = tmp_path / "figures.json"
    round_table.write(path, figures)
    key = round_table.key(settings, faces, sha256)
    assert round_table.read(path, key) == figures
    for other in (
        round_table.key(settings, faces, "0" * 64),
        round_table.key(JudgeSettings(levels=("mild",), steps=(1, 2), limit=2), faces, sha256),
        round_table.key(JudgeSettings(levels=("mild", "severe"), steps=(1, 2), limit=3), faces, sha256),
    ):
        assert round_table.read(path, other) is None  # they are figures of something else
    path.write_text(path.read_text()[:-40])
    assert round_table.read(path, key) is None
    assert round_table.read(tmp_path / "none.json", key) is None


@pytest.mark.usefixtures("_metrics")
def test_faces_to_judge_on_are_needed(faces: Path) -> None:
    (faces / "faces.csv").write_text("file,split,native_px\n0.png,train,200\n")
    with pytest.raises(
        IdmFastError, match="faces: no face of split 'val' with native_px >= 0; models are judged on these"
    ):
        round_table.check(JudgeSettings(), faces)
