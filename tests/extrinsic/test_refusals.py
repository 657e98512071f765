"""What does not fit a run of rounds is named in one line, before any work."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from idm_fast.checkpoints import native
from idm_fast.cli import main
from idm_fast.config import PRESETS
from idm_fast.errors import IdmFastError
from idm_fast.models.unet import UNet
from idm_fast.training.extrinsic import Rounds
from idm_fast.training.intrinsic import Trainer
from idm_fast.training.rounds import JudgeSettings, RoundSettings


class _Stop(BaseException):
    """As sudden as Ctrl-C."""


def _cut_state(out: Path) -> None:
    path = out / "round-1" / "state.pt"
    path.write_bytes(path.read_bytes()[:-500])


def _other_model(out: Path) -> None:
    native.save(
        out / "round-0" / "model.safetensors", UNet(PRESETS["tiny-32"].unet), PRESETS["tiny-32"], {}, torch.float16
    )


def _no_model(out: Path) -> None:
    (out / "round-0" / "model.safetensors").unlink()


def _no_table(out: Path) -> None:
    (out / "data-1" / "faces.csv").unlink()


def _half_ledger(out: Path) -> None:
    path = out / "rounds.json"
    path.write_text(path.read_text()[:-30])


def _foreign_ledger(out: Path) -> None:
    (out / "rounds.json").write_text("[1, 2]")


def _no_ledger(out: Path) -> None:
    (out / "rounds.json").unlink()


def test_other_settings_are_named(settings: RoundSettings) -> None:
    settings = replace(settings, rounds=1, control=False)
    Rounds(settings).run(budget_minutes=1e-9)
    first = replace(settings.first, batch_size=2, save_every=1, loss=replace(settings.first.loss, mse=4.0))
    changed = replace(settings, first=first, round_steps=9, clean=replace(settings.clean, blend=0.5, batch_size=5))
    with pytest.raises(IdmFastError) as caught:
        Rounds(changed).run()
    said = str(caught.value)
    assert "rounds.json: belongs to a run with batch_size = 4 (now 2), loss.mse = 5.0 (now 4.0), " in said
    assert "round_steps = 4 (now 9), clean.blend = 1.0 (now 0.5); give the same settings or another --out" in said
    (settings.first.data / "faces.csv").write_text("file,split,native_px\n0.png,train,300\n8.png,val,300\n")
    with pytest.raises(IdmFastError, match=r"belongs to a run with faces = 7, \w+ \(now 1, \w+\), bytes = .*; give"):
        Rounds(settings).run()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_cut_state, r"round-1/state.pt: is not a whole training state"),
        (_other_model, r"round-0/model.safetensors: must be the model that round-0 ended with = sha256 \w+, got \w+; "),
        (_no_model, r"round-0/model.safetensors: must be the model that round-0 ended with = .*, got no file; put"),
        (_no_table, r"data-1: must hold the faces that cleaning ended with, faces = 7, \w+, got "),
        (_half_ledger, r"rounds.json: must be a whole record of rounds \(format 1\), got something else"),
        (_foreign_ledger, r"rounds.json: must be a whole record of rounds \(format 1\), got something else"),
        (_no_ledger, r"run: must be a new folder or one with rounds.json, got round-\d of another run"),
    ],
)
def test_what_was_changed_by_hand_is_refused(
    settings: RoundSettings, monkeypatch: pytest.MonkeyPatch, spoil: Callable[[Path], None], message: str
) -> None:
    settings = replace(settings, control=False)
    original = Trainer._step

    def crashing(self: Trainer, x0: Tensor, y: Tensor) -> dict[str, float]:
        if self.settings.out.name == "round-1" and self.step == 3:
            raise _Stop
        return original(self, x0, y)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_step", crashing)
        with pytest.raises(_Stop):
            Rounds(settings).run()
    spoil(settings.first.out)
    with pytest.raises(IdmFastError, match=message) as caught:
        Rounds(settings).run()
    assert "\n" not in str(caught.value)


def test_settings_that_cannot_be(settings: RoundSettings) -> None:
    for change, message in (
        ({"rounds": 0}, "rounds must be >= 1, got 0"),
        ({"clean_workers": 0}, "clean_workers must be >= 1, got 0"),
        ({"source": "next"}, "source must be original or previous, got 'next'"),
        ({"round_steps": 0}, "steps must be >= 1, got 0"),
        ({"round_learning_rate": 0.0}, "learning_rate must be a number above 0"),
    ):
        with pytest.raises(IdmFastError, match=message):
            replace(settings, **change)
    for change, message in (
        ({"levels": ("mild", "awful")}, r"judging: levels must be some of \['mild', 'medium', 'severe'\], got"),
        ({"steps": (1, 0)}, r"judging: steps must be >= 1, got \[1, 0\]"),
        ({"limit": 0}, "judging: limit must be >= 1, got 0"),
    ):
        with pytest.raises(IdmFastError, match=message):
            JudgeSettings(**change)


def test_what_cannot_work_is_refused_before_any_step(kit: Any, settings: RoundSettings, tmp_path: Path) -> None:
    inside = replace(settings, first=replace(settings.first, out=settings.first.data / "run"))
    with pytest.raises(IdmFastError, match="output and source must lie apart"):
        Rounds(inside)
    no_val = replace(settings, judge=JudgeSettings(data=tmp_path / "nowhere"))
    with pytest.raises(IdmFastError, match=r"nowhere: must be a folder .*judged"):
        Rounds(no_val)
    (tmp_path / "taken").write_text("")
    with pytest.raises(IdmFastError, match="taken: must be a folder or a new name, got a file"):
        Rounds(kit.elsewhere(settings, "taken"))
    with pytest.raises(IdmFastError, match="faces: no face of split 'train' with native_px >= 999"):
        Rounds(replace(settings, first=replace(settings.first, min_native_px=999)))
    with pytest.raises(IdmFastError, match="faces: no face of split 'train' with native_px >= 999"):
        Rounds(replace(settings, round_min_native_px=999))
    assert not settings.first.out.exists()


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--rounds", "0"], "rounds must be >= 1, got 0"),
        (["--preset", "idm-128"], "start.safetensors: R_0 must be one model of preset idm-128, got tiny-32 for 32 px"),
        (
            ["--init-from", "idm-face"],
            "idm-face: R_0 must be one model of preset that can be trained, got idm-face-128",
        ),
        (["--init-from", "gone.safetensors"], "gone.safetensors: must be"),
        (["--clean-blend", "2"], "blend must lie in [0, 1], got 2.0"),
        (["--clean-strength", "0"], "strength must lie in (0, 1], got 0.0"),
        (["--budget-minutes", "0"], "--budget-minutes must be > 0, got 0"),
        (["--eval-steps", "0"], "judging: steps must be >= 1, got [0]"),
        (["--round-min-native-px", "500"], "no face of split 'train' with native_px >= 500"),
    ],
)
def test_wrong_usage_is_one_line(
    kit: Any, given: RoundSettings, more: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*kit.command(given), *more]) == 2
    captured = capsys.readouterr().err
    assert said in captured
    assert len(captured.strip().splitlines()) == 1
    assert not given.first.out.exists()


def test_the_command_asks_for_the_same(kit: Any, given: RoundSettings) -> None:
    Rounds(given).run()
    command = kit.command(given)
    assert main(command) == 0  # nothing left to do, and no setting that differs
    ours = kit.ledger(given)["settings"]
    other = kit.elsewhere(given, "by-command")
    assert main([*kit.command(other), "--control", "--from", "previous", "--round-min-native-px", "150"]) == 0
    assert kit.ledger(other)["settings"] == ours | {"from": "previous", "round_min_native_px": 150}
    assert (other.first.out / "control-1" / "model.safetensors").is_file()
