"""A training run: stopped and resumed it is the same run, and what can go wrong is said in one line."""

from __future__ import annotations

import csv
import math
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from interrupted import stop_at
from PIL import Image
from torch import Tensor

from idm_fast.checkpoints import native
from idm_fast.config import PRESETS, DiffusionConfig, ModelConfig, UNetConfig
from idm_fast.errors import IdmFastError
from idm_fast.models.unet import UNet
from idm_fast.training.intrinsic import Trainer
from idm_fast.training.losses import LossWeights
from idm_fast.training.settings import TrainSettings
from idm_fast.training.warm_start import warm_start

PLAIN = LossWeights(lpips_vgg=0, lpips_alex=0, identity=0)  # no weights of other networks
CRITIC = replace(PLAIN, lpips_vgg=0.1, vgg_crop=32, adversarial=0.1, critic_lead=1)


def _config(name: str, size: int, unshuffle: int) -> ModelConfig:
    unet = UNetConfig(
        image_size=size, model_channels=8, channel_mult=(1, 2), num_res_blocks=(1, 1), cond_channels=3,
        unshuffle=unshuffle, residual=True, norm_groups=4, embed_channels=16,
    )  # fmt: skip
    return ModelConfig(name, unet, DiffusionConfig("cosine_continuous", "x0"), steps=4)


TINY = {"tiny-32": _config("tiny-32", 32, 2), "tiny-64": _config("tiny-64", 64, 4)}


@pytest.fixture(autouse=True)
def _tiny_presets(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, config in TINY.items():
        monkeypatch.setitem(PRESETS, name, config)


@pytest.fixture
def settings(tmp_path: Path, made_up_faces: Callable[..., Path]) -> TrainSettings:
    """A run of six steps on five made-up faces.

    A quarter each of pure noise and rollout: whole items for a batch of 4 and of 8, which one test compares.
    """
    data = made_up_faces(5, 2, 48)
    return TrainSettings(
        data, tmp_path / "run", preset="tiny-32", steps=6, batch_size=4, learning_rate=1e-3, warmup=2, save_every=2,
        sheet_every=100, precision="fp32", loss=PLAIN, pure_noise=0.25, rollout=0.25,
    )  # fmt: skip


def _state(settings: TrainSettings) -> dict[str, Any]:
    state: dict[str, Any] = torch.load(settings.out / "state.pt", weights_only=True)
    return state


def _flat(value: Any, name: str = "") -> dict[str, Tensor]:
    if isinstance(value, dict):
        return {k: v for key, item in value.items() for k, v in _flat(item, f"{name}.{key}").items()}
    if isinstance(value, list):
        return {k: v for i, item in enumerate(value) for k, v in _flat(item, f"{name}.{i}").items()}
    return {name: value} if isinstance(value, Tensor) else {}


def _assert_same_run(a: TrainSettings, b: TrainSettings) -> None:
    first, second = _state(a), _state(b)
    assert first["step"] == second["step"]
    one, two = _flat(first), _flat(second)
    assert one.keys() == two.keys()
    assert {name.split(".")[1] for name in one} >= {"model", "ema", "optimizer"}
    assert [name for name in one if not torch.equal(one[name], two[name])] == []
    assert (a.out / "model.safetensors").read_bytes()[-1000:] == (b.out / "model.safetensors").read_bytes()[-1000:]


def _rows(settings: TrainSettings) -> list[dict[str, str]]:
    with (settings.out / "log.csv").open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize(("precision", "loss"), [("fp32", PLAIN), ("bf16", PLAIN), ("bf16", CRITIC)])
def test_an_interrupted_run_ends_with_the_same_weights(
    settings: TrainSettings, precision: str, loss: LossWeights
) -> None:
    settings = replace(settings, precision=precision, loss=loss)
    whole = replace(settings, out=settings.out.with_name("whole"))
    Trainer(whole).run()
    stop_at(Trainer(settings), 5)
    assert _state(settings)["step"] == 4  # the last state before the crash
    Trainer(settings).run()
    _assert_same_run(settings, whole)


def test_training_moves_the_weights_and_lowers_the_loss(settings: TrainSettings) -> None:
    settings = replace(settings, steps=40, learning_rate=5e-3, save_every=100)
    Trainer(settings).run()
    rows = _rows(settings)
    assert [int(row["step"]) for row in rows] == [20, 40]
    assert float(rows[-1]["mse"]) < 0.8 * float(rows[0]["mse"])
    assert all(math.isfinite(float(value)) for row in rows for value in row.values())


def test_a_time_budget_stops_and_the_same_command_goes_on(
    settings: TrainSettings, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = replace(settings, out=settings.out.with_name("whole"))
    Trainer(whole).run()
    for step in (1, 2, 3):
        Trainer(settings).run(budget_minutes=1e-9)
        assert _state(settings)["step"] == step
        assert native.load(settings.out / "model.safetensors").notes["steps"] == step
    said = capsys.readouterr().err.splitlines()  # and nothing else: the bar is for terminals
    assert said[3:] == [f"{settings.out}: step 3 of 6, wrote model.safetensors; the same command goes on"]
    Trainer(settings).run(budget_minutes=10)
    _assert_same_run(settings, whole)
    assert [int(row["step"]) for row in _rows(settings)] == [1, 2, 3, 6]
    assert _state(settings)["seconds"] > 0


def test_what_a_run_leaves(settings: TrainSettings) -> None:
    settings = replace(settings, sheet_every=4)
    settings.out.mkdir()
    (settings.out / "notes.txt").write_text("mine")
    Trainer(settings).run()
    assert sorted(path.name for path in settings.out.iterdir() if "tfevents" not in path.name) == [
        "log.csv", "model.safetensors", "notes.txt", "sheets", "state.pt",
    ]  # fmt: skip
    assert (settings.out / "notes.txt").read_text() == "mine"
    assert sorted(path.name for path in (settings.out / "sheets").iterdir()) == ["000004.png", "000006.png"]
    with Image.open(settings.out / "sheets" / "000006.png") as picture:
        assert picture.size == (4 * 32, 2 * 32)  # input, one step, four steps, truth; two validation faces
    (row,) = _rows(settings)
    assert set(row) == {"step", "seconds", "learning_rate", "mse", "grad_norm"}
    assert float(row["learning_rate"]) == pytest.approx(1e-3 / 2, abs=1e-6)
    model = native.load(settings.out / "model.safetensors")
    assert model.config == TINY["tiny-32"]
    assert (model.notes["steps"], model.notes["settings"]["batch_size"]) == (6, 4)
    assert model.notes["settings"]["data"] == "faces"  # a model file tells nobody where its maker's files lay
    assert str(settings.out.parent) not in str(model.notes)
    averaged = _state(settings)["ema"]
    for name, tensor in model.module.state_dict().items():
        assert torch.equal(tensor, averaged[name].half().float())


def test_a_finished_run_exports_again_and_says_so(settings: TrainSettings, capsys: pytest.CaptureFixture[str]) -> None:
    Trainer(settings).run()
    file = settings.out / "model.safetensors"
    before, log = file.read_bytes(), _rows(settings)
    file.unlink()
    capsys.readouterr()
    Trainer(settings).run()
    assert "step 6 of 6, wrote model.safetensors\n" in capsys.readouterr().err
    assert file.read_bytes() == before
    assert _rows(settings) == log
    Trainer(replace(settings, steps=8)).run()  # a longer run may follow
    assert _state(settings)["step"] == 8
    with pytest.raises(IdmFastError, match=r"state.pt: steps must be >= the 8 done, got 6"):
        Trainer(settings)


def test_lines_of_steps_that_are_made_again_leave_the_log(settings: TrainSettings) -> None:
    settings.out.mkdir()
    (settings.out / "log.csv").write_text("step,seconds,colour\n3,1,red\n5,2,red\nbroken\n")
    stop_at(Trainer(settings), 3)
    Trainer(settings).run()
    assert [row["step"] for row in _rows(settings)] == ["6"]


def test_changed_pictures_are_seen(settings: TrainSettings) -> None:
    Trainer(settings).run(1e-9)
    moved = replace(settings, data=shutil.copytree(settings.data, settings.data.with_name("moved")))
    Trainer(moved)  # the same pictures elsewhere
    Image.new("RGB", (48, 48)).save(moved.data / "1.png")
    with pytest.raises(IdmFastError, match=r"state.pt: belongs to a run with bytes = \d+, \w+ \(now \d+, \w+\)"):
        Trainer(moved)


def test_other_settings_are_named(settings: TrainSettings) -> None:
    Trainer(settings).run(budget_minutes=1e-9)
    changed = replace(settings, batch_size=2, loss=replace(PLAIN, snr_max=7.0), workers=1, save_every=9)
    with pytest.raises(IdmFastError) as caught:
        Trainer(changed)
    message = str(caught.value)
    assert "state.pt: belongs to a run with batch_size = 4 (now 2), loss.snr_max = 5.0 (now 7.0); give" in message
    assert "\n" not in message


def test_a_setting_that_an_older_state_does_not_know_is_no_change(settings: TrainSettings) -> None:
    Trainer(settings).run(budget_minutes=1e-9)
    state = _state(settings)
    del state["settings"]["loss"]["vgg_crop"], state["settings"]["rollout"]
    torch.save(state, settings.out / "state.pt")
    assert Trainer(settings).step == 1


def _not_a_zip(path: Path) -> None:
    path.write_bytes(b"nothing that torch wrote")


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-500])


def _weights_only(path: Path) -> None:
    torch.save({"stem.weight": torch.zeros(3)}, path)


def _other_network(path: Path) -> None:
    state = torch.load(path, weights_only=True)
    torch.save(state | {"model": {"stem.weight": torch.zeros(3)}}, path)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_not_a_zip, "is not a whole training state"),
        (_cut, "is not a whole training state"),
        (_weights_only, r"must be a training state with \['ema', .*, got \['stem.weight'\]"),
        (_other_network, "does not fit tiny-32: "),
    ],
)
def test_a_broken_state_is_one_line(settings: TrainSettings, spoil: Any, message: str) -> None:
    Trainer(settings).run(budget_minutes=1e-9)
    spoil(settings.out / "state.pt")
    with pytest.raises(IdmFastError, match=rf"state.pt: {message}") as caught:
        Trainer(settings)
    assert "\n" not in str(caught.value)


def test_warm_start_from_a_smaller_picture_size(settings: TrainSettings) -> None:
    """The larger model begins as the smaller one on averaged pixels, its answer enlarged."""
    Trainer(settings).run()
    small = settings.out / "model.safetensors"
    smaller, larger = native.load(small).module, UNet(TINY["tiny-64"].unet).eval()
    assert warm_start(larger, small) == []
    x, y = torch.randn(2, 2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    t = torch.tensor([1000.0, 300.0])
    with torch.no_grad():
        answer = smaller(F.avg_pool2d(x, 2), t, F.avg_pool2d(y, 2)) - F.avg_pool2d(y, 2)
        enlarged = larger(x, t, y) - y
    assert answer.abs().max() > 1e-3
    assert (enlarged - F.interpolate(answer, scale_factor=2.0)).abs().max() < 1e-5

    started = replace(settings, preset="tiny-64", out=settings.out.with_name("large"), init_from=small)
    trainer = Trainer(started)
    for network in (trainer.model, trainer.ema.model):
        assert all(torch.equal(tensor, larger.state_dict()[name]) for name, tensor in network.state_dict().items())
    trainer.run(budget_minutes=1e-9)
    small.unlink()  # a run that has begun needs it no more
    assert Trainer(started).step == 1


def test_warm_start_from_something_else(settings: TrainSettings, tmp_path: Path) -> None:
    with pytest.raises(IdmFastError, match=r"none.safetensors: must be a weights file"):
        Trainer(replace(settings, init_from=tmp_path / "none.safetensors"))
    other = replace(
        TINY["tiny-32"].unet, model_channels=4, norm_groups=2, embed_channels=20, unshuffle=1, residual=False
    )
    native.save(tmp_path / "o.safetensors", UNet(other), replace(TINY["tiny-32"], unet=other), {}, torch.float16)
    wide = replace(other, model_channels=12, norm_groups=3, embed_channels=28, out_channels=6)
    with pytest.raises(IdmFastError, match=r"o.safetensors: must share tensors with the model to warm-start"):
        warm_start(UNet(wide), tmp_path / "o.safetensors")


def test_a_bad_batch_is_left_out(settings: TrainSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = Trainer(settings)
    healthy, seen = trainer.loss.forward, []

    def sometimes(*args: Any) -> dict[str, Tensor]:
        seen.append({name: p.detach().clone() for name, p in trainer.model.named_parameters()})
        terms = healthy(*args)
        return {name: term * torch.nan for name, term in terms.items()} if len(seen) == 3 else terms

    monkeypatch.setattr(trainer.loss, "forward", sometimes)
    trainer.run()
    assert trainer.step == 6
    assert all(torch.equal(seen[2][name], seen[3][name]) for name in seen[0])  # the third step changed nothing
    assert not all(torch.equal(seen[3][name], seen[4][name]) for name in seen[0])
    assert all(torch.isfinite(p).all() for p in trainer.ema.model.parameters())
    assert _rows(settings)[-1]["mse"] == "nan"


@pytest.mark.parametrize("name", ["sr3-128", "gd-256", "difface-512"])
def test_presets_of_other_kinds_are_refused(settings: TrainSettings, name: str) -> None:
    with pytest.raises(IdmFastError, match=rf"preset must be a restorer .*'idm-128', 'idm-256', .*, got '{name}'"):
        Trainer(replace(settings, preset=name))
    assert not settings.out.exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 0}, "steps must be >= 1, got 0"),
        ({"seed": -1}, "seed must be >= 0, got -1"),
        ({"workers": -1}, "workers must be >= 0, got -1"),
        ({"learning_rate": 0.0}, "learning_rate must be a number above 0, got 0.0"),
        ({"grad_clip": math.nan}, "grad_clip must be a number above 0, got nan"),
        ({"rollout": 1.1}, r"rollout must lie in \[0, 1\], got 1.1"),
        ({"precision": "int8"}, "precision must be one of fp32, bf16, fp16, got 'int8'"),
    ],
)
def test_bad_settings_are_refused(settings: TrainSettings, change: dict[str, Any], message: str) -> None:
    with pytest.raises(IdmFastError, match=message):
        replace(settings, **change)


def test_an_out_that_is_a_file_is_refused_before_any_step(settings: TrainSettings) -> None:
    settings.out.write_text("")
    with pytest.raises(IdmFastError, match="run: must be a folder or a new name, got a file"):
        Trainer(settings)


def test_the_learning_rate_warms_up_stays_and_falls_to_zero(settings: TrainSettings) -> None:
    s = replace(settings, steps=100, warmup=10, learning_rate=1.0, decay_fraction=0.4)
    rates = [s.learning_rate_at(step) for step in range(100)]
    assert rates[:10] == pytest.approx([0.1 * i for i in range(1, 11)])
    assert rates[10:60] == [1.0] * 50
    assert rates[60:] == pytest.approx([(100 - step) / 40 for step in range(60, 100)])


SCRIPT = """
import sys
from pathlib import Path
import idm_fast.config as config
from idm_fast.training.intrinsic import Trainer
from idm_fast.training.losses import LossWeights
from idm_fast.training.settings import TrainSettings

def main():
    import torch
    torch.set_num_threads(1)
    tiny = config.from_dict(config.ModelConfig, {tiny!r})
    config.PRESETS[tiny.name] = tiny
    loss = LossWeights(lpips_vgg=0, lpips_alex=0, identity=0)
    s = TrainSettings(Path({data!r}), Path({out!r}), preset=tiny.name, steps=6, batch_size=4, learning_rate=1e-3,
                      warmup=2, save_every=2, sheet_every=100, precision="fp32", loss=loss,
                      pure_noise=0.25, rollout=0.25)
    Trainer(s).run()

main()
"""


@pytest.mark.slow
def test_two_processes_train_as_one_with_twice_the_batch(settings: TrainSettings, tmp_path: Path) -> None:
    """Both go on from the same first step, so this is a resumed run too."""
    one, both = replace(settings, batch_size=8, out=tmp_path / "one"), replace(settings, out=tmp_path / "both")
    Trainer(one).run(budget_minutes=1e-9)
    start = _state(one)
    both.out.mkdir()
    torch.save(start | {"settings": both.to_dict()}, both.out / "state.pt")
    script = tmp_path / "train.py"
    script.write_text(SCRIPT.format(tiny=TINY["tiny-32"].to_dict(), data=str(both.data), out=str(both.out)))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            said = process.communicate(timeout=240)[1]
        except subprocess.TimeoutExpired:
            process.terminate()  # it ends its children; killed, it would leave them
            pytest.fail("the two processes hang")
    assert process.returncode == 0, said[-6000:]
    assert said.count("step 6 of 6") == 1  # one process speaks
    Trainer(one).run()
    a, b = _state(one), _state(both)
    assert a["step"] == b["step"] == 6
    for name, first in start["model"].items():
        moved = (a["model"][name] - first).norm()
        assert (a["model"][name] - b["model"][name]).norm() <= 0.01 * moved + 1e-7, name
    assert [row["step"] for row in _rows(both)] == ["6"]
