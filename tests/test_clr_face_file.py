"""A whole CLR-Face model as one file, and settings of parts that do not fit."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_clr_face import CONFIG, PRIOR, UNET, VQGAN, tiny_clr_face

from idm_fast.checkpoints import describe, native
from idm_fast.checkpoints.kinds import CLR_FACE
from idm_fast.config_clr_face import ClrFaceConfig
from idm_fast.errors import IdmFastError


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.safetensors"
    native.save(path, tiny_clr_face(), CONFIG, {"by": "test"}, torch.float16)
    return path


def test_what_is_saved_comes_back(file: Path) -> None:
    loaded, module = native.load_any(file, CLR_FACE), tiny_clr_face()
    assert loaded.config == CONFIG
    stored = dict(module.state_dict())
    assert {name.split(".")[0] for name in stored} == {"vqgan", "prior", "irn", "mask"}
    for name, tensor in loaded.module.state_dict().items():
        assert torch.equal(tensor, stored[name].half().float()), name
    bytes_of_weights = 2 * sum(tensor.numel() for tensor in stored.values())
    assert bytes_of_weights < file.stat().st_size < bytes_of_weights + 60_000  # names, shapes and settings
    said = describe(file)
    assert (said["kind"], said["config"]["name"], said["tensors"]) == ("clr_face", "tiny-face", len(stored))
    with pytest.raises(IdmFastError, match="must hold a network of kind unet, got clr_face"):
        native.load(file)


def test_a_latent_of_another_size_is_refused() -> None:
    module = tiny_clr_face()
    with torch.no_grad():
        latents = torch.zeros(2, 4, 8, 8)
        whole = module.decode(latents)
        latents[1, 3, 7, 7] = torch.inf
        lost = module.decode(latents)
        assert whole.shape == (2, 3, 32, 32)
        assert torch.equal(lost[0], whole[0])
        assert lost[1].isnan().all()  # no code is near it
        for shape in ((2, 4, 4, 4), (2, 3, 8, 8), (4, 8, 8)):
            with pytest.raises(IdmFastError, match=r"ClrFace: latent must be \[N, 4, 8, 8\], got"):
                module.decode(torch.zeros(shape))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"prior": replace(PRIOR, latent=False)}, "prior must work on latents, got tiny-prior"),
        (
            {"vqgan": replace(VQGAN, embed_channels=3)},
            "prior must have the latent's channels, condition and no classes = 3, 3, 3 and 0, got 4, 4, 4 and 0",
        ),
        ({"vqgan": replace(VQGAN, image_size=64)}, "prior must be of the latent's size = 16, got 8"),
        ({"prior": replace(PRIOR, unet=replace(UNET, num_classes=2))}, "got 4, 4, 4 and 2"),
        ({"vqgan": replace(VQGAN, in_channels=1)}, "vqgan must work on pictures = 3 channels, got 1 and 3"),
        ({"guidance_scale": -1.0}, "guidance_scale must be >= 0, got -1.0"),
        ({"guidance_scale": float("nan")}, "guidance_scale must be >= 0, got nan"),
        ({"guidance_interval": (0.5, 0.5)}, "guidance_interval must be 0 <= start < stop <= 1"),
        ({"guidance_interval": (0.0, 0.5, 1.0)}, "guidance_interval must be 0 <= start < stop <= 1"),
        ({"guidance_every": 0}, "guidance_every must be >= 1, got 0"),
    ],
)
def test_parts_that_do_not_fit_are_refused(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(IdmFastError, match=message):
        replace(CONFIG, **changed)


def test_a_file_whose_parts_do_not_fit_is_named(file: Path) -> None:
    config = CONFIG.to_dict()
    for part, key, value, message in (
        ("vqgan", "image_size", 64, r"prior must be of the latent's size = 16, got 8"),
        ("mask", "", None, r"1 tensors missing \['mask.logits'\]"),
    ):
        tensors = load_file(file)
        changed = config | ({part: config[part] | {key: value}} if key else {})
        if not key:
            del tensors["mask.logits"]
        wrong = file.with_name(f"{part}.safetensors")
        header = {"format": 1, "kind": "clr_face", "config": changed}
        save_file(tensors, wrong, metadata={"idm_fast": json.dumps(header)})
        with pytest.raises(IdmFastError, match=message) as caught:
            native.load_any(wrong)
        assert str(wrong) in str(caught.value)


def test_settings_survive_json() -> None:
    from idm_fast.config import from_dict

    assert from_dict(ClrFaceConfig, json.loads(json.dumps(CONFIG.to_dict()))) == CONFIG
