"""Rounds of cleaning and training: what they make, and of what."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from idm_fast.checkpoints import native
from idm_fast.config import PRESETS
from idm_fast.errors import IdmFastError
from idm_fast.training import judging, round_table
from idm_fast.training.extrinsic import Rounds, find_start
from idm_fast.training.intrinsic import Trainer
from idm_fast.training.rounds import JudgeSettings, RoundSettings, digest


def test_two_rounds_and_what_they_leave(kit: Any, settings: RoundSettings, capsys: pytest.CaptureFixture[str]) -> None:
    assert Rounds(settings).run()
    out = settings.first.out
    assert sorted(path.name for path in out.iterdir()) == sorted([*kit.PARTS, "rounds.json", "table.json", "table.md"])
    for name in kit.PARTS:
        if not name.startswith("data"):
            assert not (out / name / "state.pt").exists()  # large, and needed no more
            assert native.load(out / name / "model.safetensors").config == PRESETS["tiny-32"]
            assert (out / name / "log.csv").is_file()

    done = kit.ledger(settings)["done"]
    assert list(done) == kit.PARTS
    assert {name: facts.get("start") for name, facts in done.items() if "start" in facts} == {
        "round-0": None, "round-1": "round-0", "control-1": "round-0", "round-2": "round-1", "control-2": "control-1",
    }  # fmt: skip
    assert [done[name]["data"] for name in ("round-0", "round-1", "control-1", "round-2", "control-2")] == [
        "faces", "data-1", "faces", "data-2", "faces",
    ]  # fmt: skip
    assert [(done[name]["source"], done[name]["model"]) for name in ("data-1", "data-2")] == [
        ("faces", "round-0"),
        ("faces", "round-1"),
    ]
    for name in ("data-1", "data-2"):
        facts = done[name]
        assert (facts["total"], facts["copied"], facts["failed"]) == (9, 2, 0)
        assert facts["kept"] + facts["blended"] + facts["rejected"] == 7
        assert facts["kept"] + facts["blended"] > 0
        cleaned = kit.pixels(settings, name)
        originals = {path.name: path.read_bytes() for path in settings.first.data.glob("*.png")}
        assert {key for key in originals if cleaned[key] == originals[key]} >= {"7.png", "8.png"}  # not of training
        assert cleaned != originals

    assert kit.pixels(settings, "data-1") != kit.pixels(settings, "data-2")
    for one, two in (("round-0", "round-1"), ("round-1", "round-2"), ("round-1", "control-1")):
        assert kit.differ(kit.weights(settings, one), kit.weights(settings, two))

    said = capsys.readouterr().err
    assert said.strip().splitlines()[-1] == f"{out}: 2 rounds finished, see table.md"
    table = (out / "table.md").read_text()
    assert "| D_1 | faces by round-0 | 9 | " in table
    assert "| control 2 | control-1 | faces | 4 | " in table


def test_a_training_of_rounds_is_the_intrinsic_one(kit: Any, settings: RoundSettings) -> None:
    """R_1 is what 'train intrinsic' would make of D_1 from R_0's file, and the control of D_0."""
    Rounds(replace(settings, rounds=1)).run()
    for name, data in (("round-1", settings.first.out / "data-1"), ("control-1", settings.first.data)):
        alone = replace(
            settings.first, data=data, out=settings.first.out.with_name(f"alone-{name}"), steps=4, learning_rate=5e-3,
            seed=1, init_from=settings.first.out / "round-0" / "model.safetensors",
        )  # fmt: skip
        Trainer(alone).run()
        ours, theirs = kit.weights(settings, name), native.load(alone.out / "model.safetensors").module.state_dict()
        assert not kit.differ(ours, theirs)


def test_more_rounds_may_follow_and_a_control(kit: Any, settings: RoundSettings) -> None:
    whole = kit.elsewhere(settings, "whole")
    Rounds(whole).run()
    Rounds(replace(settings, rounds=1, control=False)).run()
    Rounds(settings).run()
    kit.check_same(settings, whole)


def test_each_round_cleans_the_one_before_if_asked(kit: Any, settings: RoundSettings) -> None:
    Rounds(replace(settings, source="previous", control=False)).run()
    done = kit.ledger(settings)["done"]
    assert (done["data-2"]["source"], done["data-2"]["model"]) == ("data-1", "round-1")


def test_a_given_model_is_the_first(kit: Any, settings: RoundSettings, tmp_path: Path) -> None:
    """Its bytes, and its defaults of sampling, which its successors keep."""
    Rounds(replace(kit.elsewhere(settings, "other"), rounds=1)).run()
    trained = tmp_path / "other" / "round-0" / "model.safetensors"
    start = tmp_path / "mine.safetensors"
    own = replace(PRESETS["tiny-32"], name="mine", steps=7)
    native.save(start, native.load(trained).module, own, {}, torch.float16)
    given = replace(settings, first=replace(settings.first, init_from=start), control=False, rounds=1)
    Rounds(given).run()
    out = settings.first.out
    assert (out / "round-0" / "model.safetensors").read_bytes() == start.read_bytes()
    assert native.load(out / "round-1" / "model.safetensors").config == own
    assert not kit.differ(kit.weights(given, "round-1"), kit.weights(kit.elsewhere(settings, "other"), "round-1"))
    assert kit.ledger(given)["done"]["round-0"]["start"] == "mine.safetensors"


def test_soft_faces_may_join_once_they_are_cleaned(settings: RoundSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    counts = {}
    original = Trainer.run

    def counting(self: Trainer, minutes: float | None = None) -> None:
        counts[self.settings.out.name] = len(self.faces)
        original(self, minutes)

    monkeypatch.setattr(Trainer, "run", counting)
    first = replace(settings.first, min_native_px=200)
    Rounds(replace(settings, first=first, round_min_native_px=150, rounds=1)).run()
    assert counts == {"round-0": 2, "round-1": 4, "control-1": 4}


def test_models_are_judged_once_and_again_when_asked_otherwise(
    settings: RoundSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    judged: list[tuple[str, bool]] = []

    def judge(folder: Path, name: str, how: Any, own: Path, wanted: Any, *, first: Path | None, **_: Any) -> None:
        judged.append((name, first is None))
        (folder / "values.safetensors").write_text("")
        figures = {"key": wanted, "report": {"rows": [{"name": name}]}, "values": digest(folder / "values.safetensors")}
        judging.write_json(folder / "figures.json", figures)

    monkeypatch.setattr(judging, "judge", judge)
    monkeypatch.setattr(judging, "check", lambda *_: None)
    monkeypatch.setattr(round_table, "write_table", lambda out, done, figures: shown.append([*figures]))
    shown: list[list[Any]] = []
    settings = replace(settings, rounds=1, judge=JudgeSettings())
    Rounds(settings).run()
    assert judged == [("R_0", True), ("R_1", False), ("control 1", False)]
    assert [len(figures) for figures in shown] == [1, 2, 3, 3]  # after each of them, and at the end
    judged.clear()
    (settings.first.out / "round-1" / "figures.json").write_text("{half")
    Rounds(settings).run()
    assert judged == [("R_1", False)]
    judged.clear()
    Rounds(replace(settings, judge=JudgeSettings(levels=("mild",)))).run()
    assert judged == [("R_0", True), ("R_1", False), ("control 1", False)]


def test_the_start_is_one_model_of_the_preset() -> None:
    assert find_start(None, None) == (None, "idm-128")
    file, name = find_start("idm-face-256", None)
    assert (file is not None and file.name, name) == ("idm-face-256.safetensors", "idm-256")
    assert find_start("idm-face", "idm-128")[1] == "idm-128"
    with pytest.raises(
        IdmFastError, match=r"idm-face: R_0 must be one model .*, got idm-face-128 for 128 px, idm-face"
    ):
        find_start("idm-face", None)
    with pytest.raises(IdmFastError, match=r"idm-face-128: R_0 must be one model of preset idm-256, got idm-face-128"):
        find_start("idm-face-128", "idm-256")
    with pytest.raises(IdmFastError, match="model must be"):
        find_start("idm-face-127", None)
