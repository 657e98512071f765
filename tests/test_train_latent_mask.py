"""The mask's training: resumed it is the same run; what it writes is a whole model; it opens where guidance helps."""

from __future__ import annotations

import csv
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from interrupted import stop_at, tensors
from PIL import Image
from torch import nn

from idm_fast import checkpoints
from idm_fast.checkpoints import native
from idm_fast.cli import main
from idm_fast.config import DiffusionConfig, ModelConfig, UNetConfig
from idm_fast.config_vqgan import VqganConfig
from idm_fast.errors import IdmFastError
from idm_fast.latent_space import LatentSpace
from idm_fast.models.clr_face import ClrFace
from idm_fast.models.irn import Irn, IrnConfig
from idm_fast.models.recognition import Recognition
from idm_fast.models.unet import UNet
from idm_fast.models.vqgan import Vqgan
from idm_fast.training.guided import WAYS
from idm_fast.training.identity_settings import LatentMaskSettings, MaskLossWeights
from idm_fast.training.latent_mask import LatentMaskTrainer
from idm_fast.training.mask_picture import draw_mask, heat

VQ = VqganConfig(
    image_size=32, model_channels=8, channel_mult=(1, 1), num_res_blocks=(1, 1), middle_attention=False, norm_groups=4,
    codebook_size=16, unshuffle=2, z_channels=4, embed_channels=4, latent_scale=1.7, name="tiny-vq",
)  # fmt: skip
PRIOR = ModelConfig(
    "tiny-prior",
    UNetConfig(
        image_size=8, model_channels=8, channel_mult=(1,), num_res_blocks=(1,), in_channels=4, cond_channels=4,
        out_channels=4, residual=True, norm_groups=4, middle_attention="none",
    ),
    DiffusionConfig(schedule="vp_sde", prediction="x0", beta_start=0.1, beta_end=20.0), steps=2, latent=True,
)  # fmt: skip
ALONE = MaskLossWeights(lpips=0, l1=0, sparsity=0)


@pytest.fixture
def settings(tmp_path: Path, made_up_faces: Callable[..., Path]) -> LatentMaskSettings:
    """A run of two steps on three made-up faces, with parts of random weights."""
    try:
        Recognition()
    except IdmFastError as error:
        pytest.skip(str(error))
    data = made_up_faces(3, 2, 32)
    torch.manual_seed(0)
    vqgan, prior, irn = Vqgan(VQ), UNet(PRIOR.unet), Irn(IrnConfig(rank=1, free_weights=0))
    nn.init.normal_(prior.out_conv.weight, std=0.1)  # else it is the degraded latent
    files = [tmp_path / f"{name}.safetensors" for name in ("vqgan", "prior", "irn")]
    native.save(files[0], vqgan, VQ, {}, torch.float16)
    native.save(files[1], prior, PRIOR, LatentSpace.of(vqgan).to_notes(), torch.float16)
    native.save(files[2], irn, irn.config, {"steps": 7}, torch.float16)
    return LatentMaskSettings(
        data, tmp_path / "run", vqgan=files[0], prior=files[1], irn=files[2], steps=2, batch_size=2, warmup=1,
        save_every=1, sheet_every=2, guidance_interval=(0.0, 0.9), val_faces=2, loss=replace(ALONE, sparsity=0.01),
    )  # fmt: skip


def test_an_interrupted_run_ends_with_the_same_whole_model(
    settings: LatentMaskSettings, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = replace(settings, out=settings.out.with_name("whole"))
    LatentMaskTrainer(whole).run()
    stop_at(LatentMaskTrainer(settings), 1)
    parts = [f"--{name}={settings.data.parent / name}.safetensors" for name in ("vqgan", "prior", "irn")]
    given = "--steps 2 --batch-size 2 --warmup 1 --save-every 1 --sheet-every 2 --guidance-interval 0 0.9 --val-faces 2"
    losses = "--loss-lpips 0 --loss-l1 0 --loss-sparsity 0.01"
    command = ["train", "latent-mask", *parts, f"--data={settings.data}", f"--out={settings.out}"]
    command += f"{given} {losses}".split()
    assert main(command) == 0
    first, second = (tensors(torch.load(s.out / "state.pt", weights_only=True)) for s in (whole, settings))
    assert first.keys() == second.keys()
    assert [name for name in first if not torch.equal(first[name], second[name])] == []
    tables = [(s.out / "guidance.csv").read_text() for s in (whole, settings)]
    assert tables[0] == tables[1]
    (row,) = csv.DictReader(tables[0].splitlines())
    assert row["step"] == "2"
    assert {f"found_{way}" for way in WAYS} <= set(row)
    assert row["cosine_unguided"] != row["cosine_unmasked"] != row["cosine_masked"]
    made = checkpoints.load(settings.out / "model.safetensors")
    assert isinstance(made.module, ClrFace)
    assert (made.config.vqgan, made.config.prior, made.config.guidance_interval) == (VQ, PRIOR, (0.0, 0.9))
    assert made.notes["parts"]["irn"] == {"steps": 7}
    for part in ("vqgan", "prior", "irn"):
        weights = checkpoints.load(settings.data.parent / f"{part}.safetensors").module.state_dict()
        for name, tensor in getattr(made.module, part).state_dict().items():
            assert torch.equal(tensor, weights[name])
    assert torch.equal(made.module.mask.logits, second[".ema.logits"].half().float())
    with Image.open(settings.out / "sheets" / "000002.png") as sheet:
        assert sheet.size == (5 * 32, 2 * 32)
    assert (settings.out / "sheets" / "mask-000002.png").is_file()
    native.save(settings.irn, Irn(made.config.irn), made.config.irn, {}, torch.float16)
    capsys.readouterr()
    assert main(command) == 2
    assert "irn.safetensors: must be the irn that the run began with = " in capsys.readouterr().err


@pytest.mark.parametrize(("loss", "opens"), [(ALONE, True), (replace(ALONE, identity=1e-9, sparsity=1), False)])
def test_it_opens_where_guidance_helps_and_closes_where_it_costs(
    settings: LatentMaskSettings, loss: MaskLossWeights, opens: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Faces that are not degraded, and a recovery network that changes nothing: guidance goes to the true identity."""
    monkeypatch.setattr("idm_fast.training.data.degrade", lambda x0, rng: x0)
    trainer = LatentMaskTrainer(replace(settings, loss=loss, precision="fp32", guidance_scale=0.02))
    before = trainer.model().mean().item()
    for _ in range(3):
        next(trainer._steps())
    moved = trainer.model().mean().item() - before
    assert moved > 0.01 if opens else moved < -0.01


def test_parts_that_do_not_fit_are_named(settings: LatentMaskSettings) -> None:
    torch.manual_seed(1)
    other = settings.vqgan.with_name("other.safetensors")
    native.save(other, Vqgan(VQ), VQ, {}, torch.float16)
    with pytest.raises(IdmFastError, match=r"other\.safetensors: must be the VQGAN that .*prior\.safetensors was"):
        LatentMaskTrainer(replace(settings, vqgan=other))
    with pytest.raises(IdmFastError, match=r"prior\.safetensors: must hold a network of kind irn, got unet"):
        LatentMaskTrainer(replace(settings, irn=settings.prior))
    with pytest.raises(IdmFastError, match=r"interval must hold one of the prior's 2 evaluations, .* \(0\.6"):
        LatentMaskTrainer(replace(settings, guidance_interval=(0.6, 1.0)))
    for changed, message in (
        ({"guidance_scale": 0.0}, "guidance_scale must be a number above 0, got 0.0"),
        ({"val_faces": 0}, "val_faces must be >= 1, got 0"),
        ({"precision": "fp16"}, "precision must be fp32 or bf16 for a latent mask, got fp16"),
    ):
        with pytest.raises(IdmFastError, match=message):
            replace(settings, **changed)  # type: ignore[arg-type]
    with pytest.raises(IdmFastError, match="loss: identity must be above 0, got 0"):
        MaskLossWeights(identity=0)


def test_the_picture_of_a_mask(tmp_path: Path) -> None:
    """Darker is less, at its place; a tile each for the face, the mask over it, the mean, and every channel."""
    mask = torch.zeros(4, 8, 8)
    mask[2, :4] = 1.0
    draw_mask(mask, torch.zeros(3, 32, 32), tmp_path / "mask.png")
    with Image.open(tmp_path / "mask.png") as picture:
        pixels = np.asarray(picture)
    assert pixels.shape == (3 * 290 + 48, 3 * 268 + 12, 3)
    dark, light = (tuple(heat(torch.tensor([[value]]))[0, 0].tolist()) for value in (0.0, 1.0))
    left, top = 12 + 2 * 268 + 128, 290 + 22  # channel 2: the last tile of the second row
    assert tuple(pixels[top + 60, left]) == light
    assert tuple(pixels[top + 200, left]) == dark
    quarter = tuple(heat(torch.tensor([[0.25]]))[0, 0].tolist())
    assert tuple(pixels[22 + 60, left]) == quarter
    brightness = heat(torch.linspace(0, 1, 50)[None]).double().sum(2)[0]
    assert (brightness.diff() > 0).all()
