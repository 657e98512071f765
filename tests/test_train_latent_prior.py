"""A latent prior's training: resumed it is the same run, it belongs to one VQGAN, and its scale travels with it."""

from __future__ import annotations

import csv
import math
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from interrupted import stop_at, tensors
from PIL import Image

from idm_fast import checkpoints
from idm_fast.checkpoints import native
from idm_fast.cli import main
from idm_fast.config import PRESETS, DiffusionConfig, ModelConfig, UNetConfig
from idm_fast.config_vqgan import VqganConfig
from idm_fast.errors import IdmFastError
from idm_fast.latent_space import LatentSpace, matched, weights_digest
from idm_fast.models.vqgan import Vqgan
from idm_fast.training.data import FacePairs, list_faces, load_crop
from idm_fast.training.latent_loss import LatentLoss, LatentLossWeights
from idm_fast.training.latent_prior import LatentPriorTrainer
from idm_fast.training.latent_settings import LatentPriorSettings
from idm_fast.training.reconstruction import deviation

VQ = VqganConfig(
    image_size=64, model_channels=16, channel_mult=(1, 1), num_res_blocks=(1, 1), middle_attention=False, norm_groups=4,
    codebook_size=64, unshuffle=2, name="tiny-vq",
)  # fmt: skip
UNET = UNetConfig(
    image_size=16, model_channels=16, channel_mult=(1, 1), num_res_blocks=(1, 1), cond_channels=3, residual=True,
    norm_groups=4, embed_channels=16,
)  # fmt: skip
TINY = ModelConfig(
    "tiny-prior", UNET, DiffusionConfig("vp_sde", "x0", beta_start=0.1, beta_end=20), steps=4, latent=True,
    spacing="angle",
)  # fmt: skip
PLAIN = LatentLossWeights(lpips_alex=0)  # no weights of other networks
ALEX = LatentLossWeights(decoded=0.5)


@pytest.fixture(autouse=True)
def _tiny_preset(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PRESETS, TINY.name, TINY)


def _vqgan(path: Path, seed: int, scale: float = 1.0) -> Path:
    torch.manual_seed(seed)
    native.save(path, Vqgan(VQ), replace(VQ, latent_scale=scale), {}, torch.float16)
    return path


@pytest.fixture
def settings(tmp_path: Path, made_up_faces: Callable[..., Path]) -> LatentPriorSettings:
    """A run of five steps on five made-up faces and a random autoencoder that does not know its scale."""
    data = made_up_faces(5, 2, 80)
    return LatentPriorSettings(
        data, tmp_path / "run", TINY.name, steps=4, batch_size=4, warmup=2, save_every=2, sheet_every=100,
        precision="fp32", vqgan=_vqgan(tmp_path / "vq.safetensors", 0), val_faces=2, loss=PLAIN,
        pure_noise=0.25, rollout=0.25,
    )  # fmt: skip


def _rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_an_interrupted_run_ends_with_the_same_weights(
    settings: LatentPriorSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the term of pictures; and the scale stays that of the run, also where the data have changed."""
    monkeypatch.setattr(LatentPriorTrainer, "_draw", lambda self, path: None)  # it changes nothing, and takes its time
    settings = replace(settings, loss=ALEX, precision="bf16")
    whole = replace(settings, out=settings.out.with_name("whole"))
    LatentPriorTrainer(whole).run()
    stop_at(LatentPriorTrainer(settings), 3)  # a state was saved after 2
    with monkeypatch.context() as patch:
        patch.setattr(LatentPriorTrainer, "_measured_scale", lambda self, faces: math.nan)
        LatentPriorTrainer(settings).run()
    states = [torch.load(s.out / "state.pt", weights_only=True) for s in (whole, settings)]
    first, second = (tensors(state) for state in states)
    assert {name.split(".")[1] for name in first} >= {"model", "ema", "optimizer"}
    assert states[0]["latents"] == states[1]["latents"]
    assert first.keys() == second.keys()
    assert [name for name in first if not torch.equal(first[name], second[name])] == []
    files = [s.out / "model.safetensors" for s in (whole, settings)]
    assert files[0].read_bytes()[-1000:] == files[1].read_bytes()[-1000:]


def test_it_learns(settings: LatentPriorSettings) -> None:
    """A fresh network answers with the degraded latent; the same batch again and again comes nearer to the clean."""
    trainer = LatentPriorTrainer(replace(settings, learning_rate=3e-3, steps=100))
    trainer.step = 2  # warmed up, and never counted on: always the same noise
    pairs = FacePairs(trainer.faces, VQ.image_size, 4, 0)
    x0, y = (torch.stack(column) for column in zip(*(pairs[i] for i in range(4)), strict=True))
    found = [trainer._step(x0, y) for _ in range(16)]
    assert found[0]["error"] == pytest.approx(found[0]["error_cond"], rel=1e-4)
    assert found[-1]["error"] < 0.9 * found[0]["error"]


def test_it_reports(settings: LatentPriorSettings) -> None:
    LatentPriorTrainer(replace(settings, sheet_every=2)).run()
    (row,) = _rows(settings.out / "log.csv")
    found = _rows(settings.out / "validation.csv")
    assert [int(each["step"]) for each in found] == [2, 4]
    assert {f"psnr_{name}" for name in ("1", "4", "degraded", "vqgan")} <= set(found[0])
    assert all(math.isfinite(float(value)) for each in [row, *found] for value in each.values())
    with Image.open(settings.out / "sheets" / "000004.png") as sheet:
        assert sheet.size == (4 * 64, 2 * 64)


def test_the_scale_travels_with_the_model(settings: LatentPriorSettings) -> None:
    """A VQGAN's own is used; one that has none gets what makes the latents' deviation 1."""
    trainer = LatentPriorTrainer(replace(settings, steps=1))
    trainer.run()
    made = checkpoints.load(settings.out / "model.safetensors")
    vqgan = checkpoints.load(settings.vqgan).module
    config = matched(made.notes, "prior", vqgan, settings.vqgan)
    assert config == replace(VQ, latent_scale=trainer.scale)
    pictures = torch.stack([load_crop(face.path, VQ.image_size) for face in list_faces(settings.data, "train")])
    with torch.no_grad():
        assert deviation(vqgan.encode(pictures) * trainer.scale) == pytest.approx(1, rel=1e-3)
    other = replace(settings, vqgan=_vqgan(settings.out.with_name("own.safetensors"), 0, 0.37))
    assert LatentPriorTrainer(replace(other, out=settings.out.with_name("b"))).scale == 0.37


def test_a_prior_belongs_to_one_vqgan(settings: LatentPriorSettings, tmp_path: Path) -> None:
    LatentPriorTrainer(replace(settings, steps=1)).run()
    file = settings.out / "model.safetensors"
    notes = checkpoints.load(file).notes
    assert str(tmp_path) not in str(notes)  # a file for others
    stranger = checkpoints.load(_vqgan(tmp_path / "other.safetensors", 1)).module
    with pytest.raises(IdmFastError, match=r"^other: must be the VQGAN that .*model.safetensors was trained with = we"):
        matched(notes, file, stranger, "other")
    with pytest.raises(IdmFastError, match=r"which has codebook_size = 64 \(got 32\)"):
        matched(notes, file, Vqgan(replace(VQ, codebook_size=32)), "other")
    with pytest.raises(IdmFastError, match=r"notes must say whose latents it works on \(vqgan\), got \[\]"):
        LatentSpace.noted({}, file)
    with pytest.raises(IdmFastError, match="must be the VQGAN that the run began with = weights"):
        LatentPriorTrainer(replace(settings, vqgan=tmp_path / "other.safetensors"))
    moved = tmp_path / "moved.safetensors"
    settings.vqgan.rename(moved)
    LatentPriorTrainer(replace(settings, vqgan=moved))  # the same one in another place is the same one


def test_the_digest_is_of_the_weights_as_files_hold_them(tmp_path: Path) -> None:
    torch.manual_seed(0)
    vqgan = Vqgan(VQ)
    native.save(tmp_path / "a.safetensors", vqgan, VQ, {}, torch.float16)
    assert weights_digest(checkpoints.load(tmp_path / "a.safetensors").module) == weights_digest(vqgan)
    with torch.no_grad():
        vqgan.to_latent.bias[0] += 0.01
    assert weights_digest(checkpoints.load(tmp_path / "a.safetensors").module) != weights_digest(vqgan)


def test_the_picture_s_gradient_reaches_the_latent_through_the_codes() -> None:
    """As if the decoder had seen the code, handed on to the latent; snr weighs within its bounds."""
    torch.manual_seed(0)
    vqgan = Vqgan(VQ).requires_grad_(False)
    loss = LatentLoss(LatentLossWeights(lpips_alex=1.0, mse=2.0, snr_min=0.5, snr_max=5.0))
    x0, latent = torch.rand(2, 3, 64, 64) * 2 - 1, torch.randn(2, 3, 16, 16, requires_grad=True)
    terms = loss.picture(vqgan, latent, x0, (0, 0))
    (got,) = torch.autograd.grad(terms["lpips_alex"], latent)
    codes = vqgan.quantize(latent.detach())[0].requires_grad_()
    assert loss.alex is not None
    (expected,) = torch.autograd.grad(loss.alex(vqgan.decode(codes, quantize=False), x0).mean(), codes)
    # latent + (code - latent) is the code to an ulp of the latent, which is many times larger.
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-3 * float(expected.abs().max()))
    assert got.abs().max() > 0
    weighted = loss.latent(torch.full((3, 1, 1, 1), 0.1), torch.zeros(3, 1, 1, 1), torch.tensor([0.1, 2.0, 100.0]))
    assert weighted["mse"].item() == pytest.approx(2 * 0.01 * (0.5 + 2 + 5) / 3, rel=1e-5)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda s: replace(s, pure_noise=1.5), r"pure_noise must lie in \[0, 1\], got 1\.5"),
        (lambda s: replace(s, val_faces=0), "val_faces must be >= 1, got 0"),
        (lambda s: LatentLossWeights(mse=0, lpips_alex=0), "mse, lpips_alex or lpips_vgg must be above 0"),
        (lambda s: LatentLossWeights(decoded=0), r"decoded must lie in \(0, 1\] and vgg_crop be >= 16, got 0 and 64"),
        (lambda s: LatentPriorTrainer(replace(s, preset="idm-128")), r"preset must be a prior .*, got 'idm-128'"),
        (
            lambda s: LatentPriorTrainer(replace(s, preset="clr-prior-128")),
            r"vq.safetensors: must make latents of 4 channels of 32 x 32 for clr-prior-128, got 3 of 16 x 16",
        ),
        (lambda s: LatentPriorTrainer(replace(s, vqgan=s.data / "none.safetensors")), "none.safetensors"),
    ],
)
def test_wrong_settings_are_named(
    settings: LatentPriorSettings, make: Callable[[LatentPriorSettings], Any], message: str
) -> None:
    with pytest.raises(IdmFastError, match=message):
        make(settings)


def test_the_command_trains_and_keeps_to_its_settings(
    settings: LatentPriorSettings, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["train", "latent-prior", "--vqgan", str(settings.vqgan), "--data", str(settings.data), "--out"]
    given += [str(settings.out), "--preset", TINY.name, "--steps", "2", "--batch-size", "2", "--val-faces", "1"]
    given += ["--loss-lpips-alex", "0", "--precision", "fp32"]
    assert main(given) == 0
    assert "step 2 of 2" in capsys.readouterr().err
    assert main([*given, "--rollout", "0"]) == 2
    assert "belongs to a run with rollout = 0.375 (now 0.0)" in capsys.readouterr().err
    prior = settings.out / "model.safetensors"
    assert main([*given[:3], str(prior), *given[4:7], str(settings.out / "b"), *given[8:]]) == 2
    assert "model.safetensors: must hold a VQGAN, got a UNet" in capsys.readouterr().err


SCRIPT = """
from pathlib import Path
import torch
from idm_fast.config import PRESETS, ModelConfig, from_dict
from idm_fast.training.latent_loss import LatentLossWeights
from idm_fast.training.latent_prior import LatentPriorTrainer
from idm_fast.training.latent_settings import LatentPriorSettings

torch.set_num_threads(1)
PRESETS["tiny-prior"] = from_dict(ModelConfig, {tiny!r})
values = {values!r}
values |= {{"data": Path(values["data"]), "vqgan": Path(values["vqgan"]), "out": Path({out!r}), "batch_size": 2}}
LatentPriorTrainer(LatentPriorSettings(**values | {{"loss": LatentLossWeights(**values["loss"])}})).run()
"""


@pytest.mark.slow
def test_two_processes_train_as_one_with_twice_the_batch(settings: LatentPriorSettings, tmp_path: Path) -> None:
    one = replace(settings, steps=3, pure_noise=0.5, rollout=0.5)  # whole items of a batch of 4 and of 2
    LatentPriorTrainer(one).run()
    script, out = tmp_path / "train.py", tmp_path / "both"
    script.write_text(SCRIPT.format(tiny=TINY.to_dict(), values=one.to_dict(), out=str(out)))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=540, check=False)
    assert done.returncode == 0, done.stderr[-6000:]
    first, second = (torch.load(folder / "state.pt", weights_only=True) for folder in (one.out, out))
    assert first["step"] == second["step"] == 3
    assert first["latents"] == second["latents"]
    for name, tensor in first["ema"].items():
        moved = float((tensor - second["ema"][name]).abs().max())
        assert moved <= 2e-4, name  # of a learning rate of 6e-4: Adam takes the sign of what rounding leaves
