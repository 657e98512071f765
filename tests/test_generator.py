"""The unconditional generator: the same run however often it stops, faces from seeds, and what it refuses."""

from __future__ import annotations

import csv
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from idm_fast.checkpoints import native
from idm_fast.cli import main
from idm_fast.config import PRESETS, DiffusionConfig, ModelConfig, UNetConfig
from idm_fast.errors import IdmFastError
from idm_fast.generator import Generator
from idm_fast.models.unet import UNet
from idm_fast.training.generator import GeneratorTrainer, draw_sheet
from idm_fast.training.pictures import Pictures
from idm_fast.training.settings import GeneratorSettings

TINY = ModelConfig(
    "tiny-gen",
    UNetConfig(
        image_size=8, model_channels=16, channel_mult=(1, 2), num_res_blocks=(1, 1), unshuffle=2, norm_groups=4,
        num_head_channels=16, embed_channels=16,
    ),
    DiffusionConfig("cosine_continuous", "x0"), "dpmpp_2m", 4,
)  # fmt: skip


@pytest.fixture(autouse=True)
def _tiny_preset(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PRESETS, "tiny-gen", TINY)


def write_faces(folder: Path, count: int, colour: tuple[int, int, int], seed: int = 0, size: int = 8) -> Path:
    """Plain pictures near ``colour``, each a little lighter or darker."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    for i in range(count):
        level = np.array(colour) + rng.integers(-20, 21)
        pixels = np.broadcast_to(level.clip(0, 255).astype(np.uint8), (size, size, 3))
        Image.fromarray(np.ascontiguousarray(pixels)).save(folder / f"{i:03d}.png")
    return folder


@pytest.fixture
def settings(tmp_path: Path) -> GeneratorSettings:
    data = write_faces(tmp_path / "faces", 5, (200, 120, 60))
    return GeneratorSettings(
        data, tmp_path / "run", preset="tiny-gen", steps=6, batch_size=4, warmup=2, save_every=2, sheet_every=100,
        precision="fp32",
    )  # fmt: skip


def _state(settings: GeneratorSettings) -> dict[str, Any]:
    state: dict[str, Any] = torch.load(settings.out / "state.pt", weights_only=True)
    return state


def _assert_same_run(a: GeneratorSettings, b: GeneratorSettings) -> None:
    first, second = _state(a), _state(b)
    assert first["step"] == second["step"]
    for part in ("model", "ema"):
        assert [name for name in first[part] if not torch.equal(first[part][name], second[part][name])] == []
    moments = [state["optimizer"]["state"] for state in (first, second)]
    assert all(torch.equal(moments[0][i]["exp_avg"], moments[1][i]["exp_avg"]) for i in moments[0])
    assert native.load(a.out / "model.safetensors").notes["steps"] == first["step"]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_an_interrupted_run_ends_with_the_same_weights(
    settings: GeneratorSettings, monkeypatch: pytest.MonkeyPatch, precision: str
) -> None:
    settings = replace(settings, precision=precision)
    whole = replace(settings, out=settings.out.with_name("whole"))
    GeneratorTrainer(whole).run()
    made = GeneratorTrainer._step

    def crashing(self: GeneratorTrainer, *batch: Any) -> dict[str, float]:
        if self.step == 5:
            raise KeyboardInterrupt
        return made(self, *batch)

    with monkeypatch.context() as patch:
        patch.setattr(GeneratorTrainer, "_step", crashing)
        with pytest.raises(KeyboardInterrupt):
            GeneratorTrainer(settings).run()
    assert _state(settings)["step"] == 4  # the last state before the crash
    torch.manual_seed(99)  # states of the process must not matter
    GeneratorTrainer(settings).run()
    _assert_same_run(settings, whole)


def test_what_a_kill_left_unfinished_is_removed(settings: GeneratorSettings) -> None:
    """A state is eight times as large as the model, and every kill may leave one."""
    settings.out.mkdir()
    left = [settings.out / name for name in (".state.abcdef01.pt", ".model.abcdef01.safetensors")]
    foreign = settings.out / ".state.pt"
    for path in (*left, foreign):
        path.write_bytes(b"half")
    GeneratorTrainer(settings)
    assert not any(path.exists() for path in left)
    assert foreign.exists()


def test_a_time_budget_stops_and_the_same_command_goes_on(settings: GeneratorSettings) -> None:
    whole = replace(settings, out=settings.out.with_name("whole"))
    GeneratorTrainer(whole).run()
    GeneratorTrainer(settings).run(budget_minutes=1e-9)
    assert _state(settings)["step"] == 1
    GeneratorTrainer(settings).run(budget_minutes=10)
    _assert_same_run(settings, whole)


def test_seeds_make_runs(settings: GeneratorSettings) -> None:
    runs = [replace(settings, out=settings.out.with_name(name), seed=seed) for name, seed in (("a", 0), ("b", 0))]
    other = replace(settings, out=settings.out.with_name("c"), seed=1)
    for run in (*runs, other):
        GeneratorTrainer(run).run()
    _assert_same_run(*runs)
    assert not torch.equal(_state(runs[0])["model"]["stem.weight"], _state(other)["model"]["stem.weight"])


def test_it_learns_the_colour_of_its_pictures(settings: GeneratorSettings) -> None:
    settings = replace(settings, steps=120, learning_rate=5e-3, batch_size=8, save_every=1000, ema_decay=0.95)
    GeneratorTrainer(settings).run()
    with (settings.out / "log.csv").open(newline="") as file:
        losses = [float(row["loss"]) for row in csv.DictReader(file)]
    assert losses[-1] < 0.5 * losses[0]
    checkpoint = native.load(settings.out / "model.safetensors")
    assert checkpoint.config == TINY
    assert checkpoint.notes["settings"]["data"] == "faces"
    images = Generator(checkpoint.config, checkpoint.module, torch.device("cpu"), "fp32").generate(torch.arange(5))
    assert images.shape == (5, 3, 8, 8)
    assert images.dtype == torch.float32
    assert images.abs().max() <= 1
    expected = torch.tensor([200, 120, 60]) / 127.5 - 1
    assert (images.mean(dim=(0, 2, 3)) - expected).abs().max() < 0.2
    with Image.open(settings.out / "sheets" / "000120.png") as picture:
        assert picture.size == (8 * 8, 4 * 8)


@pytest.mark.parametrize("engine", [True, False])
def test_an_image_depends_on_its_seed_alone(engine: bool) -> None:
    torch.manual_seed(0)
    module = UNet(TINY.unet)
    for parameter in module.parameters():  # the last convolution begins as zero
        parameter.data += 0.05 * torch.randn_like(parameter)
    generator = Generator(TINY, module, torch.device("cpu"), "fp32", engine)
    told: list[int] = []
    images = generator.generate(torch.arange(5), batch_size=2, progress=told.append)
    assert told == [2, 4, 5]
    assert torch.equal(images, generator.generate(torch.arange(5), batch_size=2))
    assert (images[3:4] - generator.generate(torch.tensor([3]))).abs().max() < 1e-4
    assert (images[0] - images[1]).abs().max() > 0.01


@pytest.mark.parametrize("learned_variance", [False, True])
def test_engine_and_modules_make_the_same_images(learned_variance: bool) -> None:
    torch.manual_seed(0)
    config = TINY
    if learned_variance:  # as guided-diffusion's and DifFace's networks answer
        config = replace(TINY, unet=replace(TINY.unet, out_channels=6), diffusion=DiffusionConfig())
    module = UNet(config.unet)
    for parameter in module.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    ours, plain = (Generator(config, module, torch.device("cpu"), "fp32", engine) for engine in (True, False))
    images = ours.generate(torch.arange(3))
    assert images.shape == (3, 3, 8, 8)
    assert (images - plain.generate(torch.arange(3))).abs().max() < 1e-3


def test_every_epoch_shows_each_picture_once(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    folder.mkdir()
    for i in range(7):
        pixels = np.zeros((4, 4, 3), np.uint8)
        pixels[:, :2], pixels[:, 2:] = i, 100 + i
        Image.fromarray(pixels).save(folder / f"{i}.png")
    pictures = Pictures(folder, "train", 4)

    def shown(positions: range) -> list[int]:
        values = ((pictures.batch(positions, 3) + 1) * 127.5).round().int()
        return [int(value) for value in values[:, 0, 0, 0]]

    epochs = [shown(range(7 * e, 7 * e + 7)) for e in range(20)]
    for epoch in epochs:
        assert sorted(value % 100 for value in epoch) == list(range(7))
    assert len({tuple(epoch) for epoch in epochs}) > 15
    mirrored = sum(value >= 100 for epoch in epochs for value in epoch)
    assert 45 <= mirrored <= 95  # of 140; 5 standard deviations are 30
    assert shown(range(5, 9)) == epochs[0][5:] + epochs[1][:2]
    assert shown(range(5, 9, 2)) == shown(range(5, 9))[::2]


def test_an_unreadable_picture_is_named_and_left_out(
    settings: GeneratorSettings, capsys: pytest.CaptureFixture[str]
) -> None:
    (settings.data / "zzz.png").write_bytes(b"no picture")
    assert len(Pictures(settings.data, "train", 8)) == 5
    assert "zzz.png: cannot be read as a picture" in capsys.readouterr().err
    for file in settings.data.glob("0*.png"):
        file.unlink()
    with pytest.raises(IdmFastError, match="faces: none of the 1 pictures can be read"):
        Pictures(settings.data, "train", 8)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 0}, "steps must be >= 1, got 0"),
        ({"snr_min": 6.0}, "snr_min <= snr_max and snr_max > 0, got 6.0 and 5.0"),
        ({"snr_max": math.inf}, "snr_max > 0, got 0.3 and inf"),
        ({"ema_decay": 1.5}, r"ema_decay must lie in \[0, 1\], got 1.5"),
    ],
)
def test_bad_settings_are_refused(settings: GeneratorSettings, change: dict[str, Any], message: str) -> None:
    with pytest.raises(IdmFastError, match=message):
        replace(settings, **change)


@pytest.mark.parametrize("name", ["idm-64", "gd-256", "difface-512"])
def test_presets_of_other_kinds_are_refused(settings: GeneratorSettings, name: str) -> None:
    with pytest.raises(IdmFastError, match=rf"preset must be a generator .*'gen-64', 'tiny-gen'\], got '{name}'"):
        GeneratorTrainer(replace(settings, preset=name))
    assert not settings.out.exists()


def test_a_restorer_is_no_generator() -> None:
    config = PRESETS["idm-64"]
    with pytest.raises(
        IdmFastError, match="idm-64: a generator must have cond_channels = num_classes = 0, got 3 and 0"
    ):
        Generator(config, UNet(config.unet), torch.device("cpu"), "fp32")


def test_other_settings_and_other_kinds_of_run_are_named(settings: GeneratorSettings) -> None:
    GeneratorTrainer(settings).run(budget_minutes=1e-9)
    with pytest.raises(IdmFastError, match=r"state.pt: belongs to a run with snr_max = 5.0 \(now 4.0\); give"):
        GeneratorTrainer(replace(settings, snr_max=4.0))


def test_the_command(settings: GeneratorSettings, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "by-command"
    command = ["train", "generator", "--preset", "tiny-gen", "--out", str(out), "--steps", "2", "--batch-size", "2"]
    assert main([*command, "--data", str(settings.data)]) == 0
    assert native.load(out / "model.safetensors").notes["steps"] == 2
    assert main([*command, "--data", str(tmp_path / "none")]) == 2
    assert f"{tmp_path / 'none'}: must be a folder of aligned faces" in capsys.readouterr().err
    assert main([*command, "--data", str(settings.data), "--budget-minutes", "0"]) == 2
    assert "--budget-minutes must be > 0, got 0.0" in capsys.readouterr().err


def test_the_command_explains_itself(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["train", "generator", "--help"])
    assert stop.value.code == 0
    said = capsys.readouterr().out
    assert "--snr-max" in said
    assert "--rollout" not in said  # a restorer's
    assert all(len(line) <= 100 for line in said.splitlines())


def test_a_sheet_fills_its_last_row_with_white(tmp_path: Path) -> None:
    draw_sheet(-torch.ones(3, 3, 4, 4), tmp_path / "sheet.png", columns=2)
    with Image.open(tmp_path / "sheet.png") as picture:
        assert picture.size == (8, 8)
        assert picture.getpixel((0, 0)) == (0, 0, 0)
        assert picture.getpixel((7, 7)) == (255, 255, 255)
