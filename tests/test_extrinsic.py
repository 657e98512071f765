"""Rounds of cleaning and training: stopped anywhere they end with the same weights, and what does not fit is named."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from idm_fast.checkpoints import native
from idm_fast.clean import CleanOptions
from idm_fast.cli import main
from idm_fast.config import PRESETS, DiffusionConfig, ModelConfig, UNetConfig
from idm_fast.errors import IdmFastError
from idm_fast.models.unet import UNet
from idm_fast.training import extrinsic
from idm_fast.training.extrinsic import Rounds, find_start
from idm_fast.training.intrinsic import Trainer
from idm_fast.training.losses import LossWeights
from idm_fast.training.rounds import JudgeSettings, Ledger, Part, RoundSettings
from idm_fast.training.settings import TrainSettings

PLAIN = LossWeights(lpips_vgg=0, lpips_alex=0, identity=0)  # no weights of other networks
UNBOUND = CleanOptions(steps=1, max_identity_distance=None, aligned=True, dtype="fp32", batch_size=3)
TINY = ModelConfig(
    "tiny-32",
    UNetConfig(
        image_size=32, model_channels=8, channel_mult=(1, 2), num_res_blocks=(1, 1), cond_channels=3, unshuffle=2,
        residual=True, norm_groups=4, embed_channels=16,
    ),
    DiffusionConfig("cosine_continuous", "x0"), steps=2,
)  # fmt: skip
PARTS = ["round-0", "data-1", "round-1", "control-1", "data-2", "round-2", "control-2"]


@pytest.fixture(autouse=True)
def _tiny_preset(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PRESETS, TINY.name, TINY)


@pytest.fixture
def settings(tmp_path: Path) -> RoundSettings:
    """Two rounds of four steps on seven made-up faces; two more of them are for validation."""
    data = tmp_path / "faces"
    data.mkdir()
    rng = np.random.default_rng(0)
    with (data / "faces.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["file", "split", "native_px"])
        for i in range(9):
            coarse = Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8))
            coarse.resize((40, 40), Image.Resampling.BICUBIC).save(data / f"{i}.png")
            writer.writerow([f"{i}.png", "train" if i < 7 else "val", 100 + 50 * (i % 3)])
    first = TrainSettings(
        data, tmp_path / "run", preset="tiny-32", steps=5, batch_size=4, learning_rate=1e-2, warmup=1, save_every=2,
        sheet_every=100, precision="fp32", loss=PLAIN, pure_noise=0.25, rollout=0.25, min_native_px=0,
    )  # fmt: skip
    return RoundSettings(first, round_steps=4, round_learning_rate=5e-3, control=True, clean=UNBOUND, judge=None)


def _elsewhere(settings: RoundSettings, name: str) -> RoundSettings:
    return replace(settings, first=replace(settings.first, out=settings.first.out.with_name(name)))


def _weights(settings: RoundSettings, name: str) -> dict[str, Tensor]:
    return native.load(settings.first.out / name / "model.safetensors").module.state_dict()


def _pixels(settings: RoundSettings, name: str) -> dict[str, bytes]:
    folder = settings.first.out / name
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.png"))}


def _assert_same_run(a: RoundSettings, b: RoundSettings) -> None:
    for name in PARTS:
        if name.startswith("data"):
            assert _pixels(a, name) == _pixels(b, name), name
        else:
            one, two = _weights(a, name), _weights(b, name)
            assert [key for key in one if not torch.equal(one[key], two[key])] == [], name


def _ledger(settings: RoundSettings) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((settings.first.out / "rounds.json").read_text())
    return found


def _differ(one: dict[str, Tensor], two: dict[str, Tensor]) -> bool:
    return any(not torch.equal(one[key], two[key]) for key in one)


def test_two_rounds_and_what_they_leave(settings: RoundSettings, capsys: pytest.CaptureFixture[str]) -> None:
    assert Rounds(settings).run()
    out = settings.first.out
    assert sorted(path.name for path in out.iterdir()) == sorted([*PARTS, "rounds.json", "table.json", "table.md"])
    for name in PARTS:
        if not name.startswith("data"):
            assert not (out / name / "state.pt").exists()  # large, and needed no more
            assert native.load(out / name / "model.safetensors").config == TINY
            assert (out / name / "log.csv").is_file()

    done = _ledger(settings)["done"]
    assert list(done) == PARTS
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
        cleaned = _pixels(settings, name)
        originals = {path.name: path.read_bytes() for path in settings.first.data.glob("*.png")}
        assert {key for key in originals if cleaned[key] == originals[key]} >= {"7.png", "8.png"}  # not of training
        assert cleaned != originals

    assert _pixels(settings, "data-1") != _pixels(settings, "data-2")
    for one, two in (("round-0", "round-1"), ("round-1", "round-2"), ("round-1", "control-1")):
        assert _differ(_weights(settings, one), _weights(settings, two))

    said = capsys.readouterr().err
    assert said.strip().splitlines()[-1] == f"{out}: 2 rounds finished, see table.md"
    table = (out / "table.md").read_text()
    assert "| D_1 | faces by round-0 | 9 | " in table
    assert "| control 2 | control-1 | faces | 4 | " in table


def test_a_training_of_rounds_is_the_intrinsic_one(settings: RoundSettings) -> None:
    """R_1 is what 'train intrinsic' would make of D_1 from R_0's file, and the control of D_0."""
    Rounds(replace(settings, rounds=1)).run()
    for name, data in (("round-1", settings.first.out / "data-1"), ("control-1", settings.first.data)):
        alone = replace(
            settings.first, data=data, out=settings.first.out.with_name(f"alone-{name}"), steps=4, learning_rate=5e-3,
            seed=1, init_from=settings.first.out / "round-0" / "model.safetensors",
        )  # fmt: skip
        Trainer(alone).run()
        ours, theirs = _weights(settings, name), native.load(alone.out / "model.safetensors").module.state_dict()
        assert not _differ(ours, theirs)


class _Stop(BaseException):
    """As sudden as Ctrl-C."""


def _stop_every(monkeypatch: pytest.MonkeyPatch, events: int) -> Callable[[], list[str]]:
    """Stops the run at every ``events``-th training step, cleaned picture or finished part; returns what it cut off."""
    seen = [0]
    cut: list[str] = []
    step, finish, real = Trainer._step, Ledger.finish, extrinsic.clean

    def event(name: str) -> None:
        seen[0] += 1
        if seen[0] % events == 0:
            cut.append(name)
            raise _Stop

    def counted_step(self: Trainer, x0: Tensor, y: Tensor) -> dict[str, float]:
        event(f"train {self.settings.out.name}")
        return step(self, x0, y)

    def counted_finish(self: Ledger, part: Part, facts: dict[str, Any]) -> None:
        event(f"finish {part.name}")
        finish(self, part, facts)

    def counted_clean(source: Path, out: Path, *rest: Any, progress: Any, **named: Any) -> Any:
        def told(*news: Any) -> None:
            progress(*news)
            event(f"clean {out.name}")

        return real(source, out, *rest, progress=told, **named)

    monkeypatch.setattr(Trainer, "_step", counted_step)
    monkeypatch.setattr(Ledger, "finish", counted_finish)
    monkeypatch.setattr(extrinsic, "clean", counted_clean)
    return lambda: cut


@pytest.mark.parametrize("events", [4, 7])
def test_stopped_anywhere_it_ends_with_the_same_weights(
    settings: RoundSettings, monkeypatch: pytest.MonkeyPatch, events: int
) -> None:
    whole = _elsewhere(settings, "whole")
    Rounds(whole).run()
    with monkeypatch.context() as patch:
        cut = _stop_every(patch, events)
        for _ in range(60):
            torch.manual_seed(99)  # states of the process must not matter
            try:
                finished = Rounds(settings).run()
                break
            except _Stop:
                continue
    assert finished
    assert {each.split()[0] for each in cut()} == {"train", "clean", "finish"} if events == 4 else len(cut()) > 3
    _assert_same_run(settings, whole)


def test_a_budget_stops_every_part_and_each_call_comes_forward(
    settings: RoundSettings, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = replace(settings, rounds=1, control=False)
    whole = _elsewhere(settings, "whole")
    Rounds(whole).run()
    capsys.readouterr()
    stops = []
    for _ in range(40):
        if Rounds(settings).run(budget_minutes=1e-9):
            break
        stops.append(capsys.readouterr().err.strip().splitlines()[-1])
    assert f"{settings.first.out}: stopped before the end of train round-0; the same command goes on" in stops
    assert f"{settings.first.out}: stopped before the end of clean data-1; the same command goes on" in stops
    assert f"{settings.first.out}: stopped before the end of train round-1; the same command goes on" in stops
    for name in ("round-0", "round-1"):
        assert not _differ(_weights(settings, name), _weights(whole, name))
    assert _pixels(settings, "data-1") == _pixels(whole, "data-1")


def test_a_finished_run_does_nothing_again(settings: RoundSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = replace(settings, rounds=1)
    Rounds(settings).run()
    before = {path: path.stat().st_mtime_ns for path in settings.first.out.rglob("*") if "table" not in path.name}
    monkeypatch.setattr(Trainer, "__init__", lambda *_: pytest.fail("trains again"))
    monkeypatch.setattr(extrinsic, "clean", lambda *_, **__: pytest.fail("cleans again"))
    assert Rounds(settings).run()
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_more_rounds_may_follow_and_a_control(settings: RoundSettings) -> None:
    whole = _elsewhere(settings, "whole")
    Rounds(whole).run()
    Rounds(replace(settings, rounds=1, control=False)).run()
    Rounds(settings).run()
    _assert_same_run(settings, whole)


def test_each_round_cleans_the_one_before_if_asked(settings: RoundSettings) -> None:
    Rounds(replace(settings, source="previous", control=False)).run()
    done = _ledger(settings)["done"]
    assert (done["data-2"]["source"], done["data-2"]["model"]) == ("data-1", "round-1")


def test_a_given_model_is_the_first(settings: RoundSettings, tmp_path: Path) -> None:
    """Its bytes, and its defaults of sampling, which its successors keep."""
    Rounds(replace(_elsewhere(settings, "other"), rounds=1)).run()
    trained = tmp_path / "other" / "round-0" / "model.safetensors"
    start = tmp_path / "mine.safetensors"
    own = replace(TINY, name="mine", steps=7)
    native.save(start, native.load(trained).module, own, {}, torch.float16)
    given = replace(settings, first=replace(settings.first, init_from=start), control=False, rounds=1)
    Rounds(given).run()
    out = settings.first.out
    assert (out / "round-0" / "model.safetensors").read_bytes() == start.read_bytes()
    assert native.load(out / "round-1" / "model.safetensors").config == own
    assert not _differ(_weights(given, "round-1"), _weights(_elsewhere(settings, "other"), "round-1"))
    assert _ledger(given)["done"]["round-0"]["start"] == "mine.safetensors"


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


def test_other_settings_are_named(settings: RoundSettings) -> None:
    settings = replace(settings, rounds=1, control=False)
    Rounds(settings).run(budget_minutes=1e-9)
    first = replace(settings.first, batch_size=2, save_every=1, loss=replace(PLAIN, mse=4.0))
    changed = replace(settings, first=first, round_steps=9, clean=replace(UNBOUND, blend=0.5, batch_size=5))
    with pytest.raises(IdmFastError) as caught:
        Rounds(changed).run()
    said = str(caught.value)
    assert "rounds.json: belongs to a run with batch_size = 4 (now 2), loss.mse = 5.0 (now 4.0), " in said
    assert "round_steps = 4 (now 9), clean.blend = 1.0 (now 0.5); give the same settings or another --out" in said
    (settings.first.data / "faces.csv").write_text("file,split,native_px\n0.png,train,300\n8.png,val,300\n")
    with pytest.raises(IdmFastError, match=r"belongs to a run with faces = 7, \w+ \(now 1, \w+\); give"):
        Rounds(settings).run()


def _cut_state(out: Path) -> None:
    path = out / "round-1" / "state.pt"
    path.write_bytes(path.read_bytes()[:-500])


def _other_model(out: Path) -> None:
    native.save(out / "round-0" / "model.safetensors", UNet(TINY.unet), TINY, {}, torch.float16)


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


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_cut_state, r"round-1/state.pt: is not a whole training state"),
        (_other_model, r"round-0/model.safetensors: must be the model that round-0 ended with = sha256 \w+, got \w+; "),
        (_no_model, r"round-0/model.safetensors: must be the model that round-0 ended with = .*, got no file; put"),
        (_no_table, r"data-1: must hold the faces that cleaning ended with = 7, \w+, got "),
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


def test_a_state_left_behind_by_a_kill_is_no_harm(settings: RoundSettings) -> None:
    """Between the record of a finished part and the removal of its state."""
    settings = replace(settings, rounds=1, control=False)
    Rounds(settings).run()
    left = settings.first.out / "round-0" / "state.pt"
    left.write_bytes(b"half")
    assert Rounds(settings).run()
    assert not left.exists()


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


def test_what_cannot_work_is_refused_before_any_step(settings: RoundSettings, tmp_path: Path) -> None:
    inside = replace(settings, first=replace(settings.first, out=settings.first.data / "run"))
    with pytest.raises(IdmFastError, match="output and source must lie apart"):
        Rounds(inside)
    no_val = replace(settings, judge=JudgeSettings(data=tmp_path / "nowhere"))
    with pytest.raises(IdmFastError, match=r"nowhere: must be a folder .*judged"):
        Rounds(no_val)
    (tmp_path / "taken").write_text("")
    with pytest.raises(IdmFastError, match="taken: must be a folder or a new name, got a file"):
        Rounds(_elsewhere(settings, "taken"))
    with pytest.raises(IdmFastError, match="faces: no face of split 'train' with native_px >= 999"):
        Rounds(replace(settings, first=replace(settings.first, min_native_px=999)))
    with pytest.raises(IdmFastError, match="faces: no face of split 'train' with native_px >= 999"):
        Rounds(replace(settings, round_min_native_px=999))
    assert not settings.first.out.exists()


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


SCRIPT = """
import sys

import torch

import idm_fast.config as config
from idm_fast.cli import main

if __name__ == "__main__":
    torch.set_num_threads(1)
    tiny = config.from_dict(config.ModelConfig, {tiny!r})
    config.PRESETS[tiny.name] = tiny
    sys.exit(main(sys.argv[1:]))
"""


def _command(settings: RoundSettings) -> list[str]:
    """The command that asks for these settings, with a single round and R_0 given."""
    s = settings.first
    numbers = {
        "rounds": 1, "round-steps": settings.round_steps, "round-learning-rate": settings.round_learning_rate,
        "batch-size": s.batch_size, "warmup": s.warmup, "save-every": s.save_every, "sheet-every": s.sheet_every,
        "pure-noise": s.pure_noise, "rollout": s.rollout, "min-native-px": 0, "loss-lpips-vgg": 0, "loss-lpips-alex": 0,
        "loss-identity": 0, "clean-steps": 1, "clean-batch-size": 3,
    }  # fmt: skip
    words = {
        "data": s.data, "out": s.out, "init-from": s.init_from, "precision": "fp32", "clean-dtype": "fp32",
        "clean-max-identity-distance": "none",
    }  # fmt: skip
    flags = [f"--{name}={value}" for name, value in (numbers | words).items()]
    return ["train", "extrinsic", "--no-eval", *flags]


@pytest.fixture
def given(settings: RoundSettings, tmp_path: Path) -> RoundSettings:
    """A round that begins from a model file."""
    torch.manual_seed(0)
    module = UNet(TINY.unet)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.ndim > 1:
                torch.nn.init.xavier_normal_(parameter)
    native.save(tmp_path / "start.safetensors", module, TINY, {}, torch.float16)
    first = replace(settings.first, init_from=tmp_path / "start.safetensors")
    return replace(settings, first=first, rounds=1, control=False)


def test_the_command_asks_for_the_same(given: RoundSettings) -> None:
    Rounds(given).run()
    command = _command(given)
    assert main(command) == 0  # nothing left to do, and no setting that differs
    ours = _ledger(given)["settings"]
    other = _elsewhere(given, "by-command")
    assert main([*_command(other), "--control", "--from", "previous", "--round-min-native-px", "150"]) == 0
    assert _ledger(other)["settings"] == ours | {"from": "previous", "round_min_native_px": 150}
    assert (other.first.out / "control-1" / "model.safetensors").is_file()


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
    given: RoundSettings, more: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*_command(given), *more]) == 2
    captured = capsys.readouterr().err
    assert said in captured
    assert len(captured.strip().splitlines()) == 1
    assert not given.first.out.exists()


def _launch(script: Path, arguments: list[str], processes: int) -> str:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    with subprocess.Popen([*command, str(script), *arguments], stderr=subprocess.PIPE, text=True) as process:
        try:
            said = process.communicate(timeout=240)[1]
        except subprocess.TimeoutExpired:
            process.terminate()  # it ends its children; killed, it would leave them
            pytest.fail("the processes hang")
    assert process.returncode == 0, said[-6000:]
    return said


@pytest.mark.slow
def test_two_processes_make_the_rounds_of_one_with_twice_the_batch(given: RoundSettings, tmp_path: Path) -> None:
    """One of the two cleans while the other waits; a budget stops both at one place, and both go on from it."""
    one = replace(given, first=replace(given.first, batch_size=8, out=tmp_path / "one"))
    Rounds(one).run()
    script = tmp_path / "rounds.py"
    script.write_text(SCRIPT.format(tiny=TINY.to_dict()))
    command = _command(given)
    stopped = _launch(script, [*command, "--budget-minutes", "1e-9"], 2)
    assert stopped.count("the same command goes on") == 1  # one process speaks
    said = _launch(script, command, 2)
    assert said.count("1 rounds finished") == 1
    assert _pixels(given, "data-1") == _pixels(one, "data-1")
    start = native.load(tmp_path / "start.safetensors").module.state_dict()
    a, b = _weights(one, "round-1"), _weights(given, "round-1")
    apart = sum(float((a[key] - b[key]).square().sum()) for key in start) ** 0.5
    moved = sum(float((a[key] - start[key]).square().sum()) for key in start) ** 0.5
    assert apart < 0.05 * moved


KILLED = """
import os
import signal

from idm_fast.training.intrinsic import Trainer
from idm_fast.training import extrinsic

left = {events}

def event():
    global left
    left -= 1
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)

step, real = Trainer._step, extrinsic.clean

def counted_step(self, x0, y):
    event()
    return step(self, x0, y)

def counted_clean(*rest, progress, **named):
    def told(*news):
        progress(*news)
        event()
    return real(*rest, progress=told, **named)

Trainer._step, extrinsic.clean = counted_step, counted_clean
"""


@pytest.mark.slow
def test_killed_while_cleaning_and_while_training(given: RoundSettings, tmp_path: Path) -> None:
    whole = _elsewhere(given, "whole")
    Rounds(whole).run()
    for events in (5, 9):  # the fourth picture; the fourth step or so after what is left of the pictures
        script = tmp_path / f"killed-{events}.py"
        script.write_text(KILLED.format(events=events) + SCRIPT.format(tiny=TINY.to_dict()))
        done = subprocess.run([sys.executable, str(script), *_command(given)], capture_output=True, timeout=240)
        assert done.returncode == -9, done.stderr[-3000:]
    assert (given.first.out / "round-1" / "state.pt").exists()
    Rounds(given).run()
    assert _pixels(given, "data-1") == _pixels(whole, "data-1")
    assert not _differ(_weights(given, "round-1"), _weights(whole, "round-1"))
    parts = given.first.out / "data-1" / ".clean" / "parts"
    assert not parts.exists() or not any(parts.iterdir())
