"""Training for identity guidance: resumed it is the same run, and its figures are those of the embeddings."""

from __future__ import annotations

import csv
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from interrupted import stop_at, tensors
from PIL import Image

from idm_fast import checkpoints
from idm_fast.cli import main
from idm_fast.errors import IdmFastError
from idm_fast.models.recognition import Recognition
from idm_fast.training.identity import IdentityTrainer
from idm_fast.training.identity_settings import IdentitySettings
from idm_fast.training.recovery import likeness


@pytest.fixture
def settings(tmp_path: Path, made_up_faces: Callable[..., Path]) -> IdentitySettings:
    """A run of two steps on three made-up faces."""
    try:
        Recognition()
    except IdmFastError as error:
        pytest.skip(str(error))
    data = made_up_faces(3, 2, 48)
    return IdentitySettings(data, tmp_path / "run", steps=2, batch_size=2, warmup=1, save_every=1, sheet_every=1)


def test_an_interrupted_run_ends_with_the_same_weights_and_figures(
    settings: IdentitySettings, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = replace(settings, out=settings.out.with_name("whole"))
    IdentityTrainer(whole).run()
    stop_at(IdentityTrainer(settings), 1)
    given = ["--steps", "2", "--batch-size", "2", "--warmup", "1", "--save-every", "1", "--sheet-every", "1"]
    command = ["train", "identity", "--data", str(settings.data), "--out", str(settings.out), *given]
    assert main(command) == 0
    first, second = (tensors(torch.load(s.out / "state.pt", weights_only=True)) for s in (whole, settings))
    assert first.keys() == second.keys()
    assert [name for name in first if not torch.equal(first[name], second[name])] == []
    tables = [(s.out / "recovery.csv").read_text() for s in (whole, settings)]
    assert tables[0] == tables[1]
    rows = list(csv.DictReader(tables[0].splitlines()))
    assert [(row["step"], row["level"], row["embedding"]) for row in rows] == [
        (step, level, who) for step in "12" for level in ("mild", "medium", "severe")
        for who in ("recovered", "own", "mean")
    ]  # fmt: skip
    by_name = {(row["level"], row["embedding"]): row for row in rows[9:]}
    assert by_name["severe", "recovered"] != by_name["severe", "own"]
    made = checkpoints.load(settings.out / "model.safetensors")
    assert made.notes["recovery"]["severe"]["own"]["cosine"] == float(by_name["severe", "own"]["cosine"])
    with Image.open(settings.out / "sheets" / "000002.png") as sheet:
        assert sheet.size == (960, 540)
    capsys.readouterr()
    assert main([*command, "--euclid", "1"]) == 2
    assert "belongs to a run with euclid = 0.25 (now 1.0)" in capsys.readouterr().err


def test_a_constant_is_near_everybody_and_finds_nobody() -> None:
    torch.manual_seed(0)
    true = torch.randn(40, 128) + 3
    mean = likeness(true.mean(0, keepdim=True).expand_as(true), true)
    assert mean.cosine > 0.9
    assert mean.found == pytest.approx(1 / 40)
    half = true.clone()
    half[20:] = true[20:].roll(1, 0)
    found = likeness(half, true)
    assert found.found == 0.5
    assert found.distance == pytest.approx(float((half - true).norm(dim=1).mean()))
    assert likeness(true, true).cosine == pytest.approx(1)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"precision": "fp16"}, "precision must be fp32 or bf16 for an identity recovery network, got fp16"),
        ({"preset": "irn"}, r"preset must be one of \['irn-128'\], got 'irn'"),
        ({"euclid": -1.0}, "euclid must be a number >= 0, got -1.0"),
    ],
)
def test_wrong_settings_are_named(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(IdmFastError, match=message):
        IdentitySettings(Path(), Path(), **changed)
