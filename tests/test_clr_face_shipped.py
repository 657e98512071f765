"""The CLR-Face model that comes with the package, by its name, on a real portrait."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from skimage import data
from torch import Tensor

from idm_fast import Restorer
from idm_fast.cli import main
from idm_fast.errors import IdmFastError
from idm_fast.evaluation.metrics import FaceMetrics
from idm_fast.faces.align import align
from idm_fast.faces.detect import FaceDetector
from idm_fast.training.degradation import degrade_level

NAME = "clr-face-128"


def picture(x: Tensor) -> Image.Image:
    return Image.fromarray(((x.permute(1, 2, 0) + 1) * 127.5).round().clamp(0, 255).byte().numpy())


def tensor(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1) / 127.5 - 1


@pytest.fixture(scope="module")
def portrait() -> Tensor:
    """Scikit-image's astronaut, aligned: [3, 128, 128] in [-1, 1]."""
    pixels = np.asarray(data.astronaut()).astype(np.float32) / 255
    try:
        face = FaceDetector()(pixels)[0]
    except IdmFastError as error:
        pytest.skip(str(error))
    return align(pixels, face, 128)[0]


def test_it_restores_and_its_guidance_keeps_the_person(portrait: Tensor) -> None:
    try:
        metrics = FaceMetrics(names=("psnr", "lpips_alex", "recognition"))
    except IdmFastError as error:
        pytest.skip(str(error))
    restorer, degraded = Restorer.from_pretrained(NAME), degrade_level(portrait, "severe", 0)
    free, guided = (
        restorer.restore(picture(degraded), aligned=True, identity_guidance=wanted) for wanted in (False, True)
    )
    assert [face.model for face in guided.faces] == [NAME]
    assert guided.steps == 1
    shown = torch.stack([degraded, tensor(free.image), tensor(guided.image)])
    found = metrics(shown, metrics.reference(portrait.expand(3, -1, -1, -1)))
    before, without, behind = (dict(zip(found, column, strict=True)) for column in torch.stack(list(found.values())).T)
    assert without["lpips_alex"] < 0.6 * before["lpips_alex"]
    assert without["psnr"] > before["psnr"] - 1
    assert behind["recognition"] < 0.95 * without["recognition"]
    assert behind["lpips_alex"] < 1.05 * without["lpips_alex"]


def test_the_command_takes_its_name(portrait: Tensor, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture(degrade_level(portrait, "medium", 0)).save(tmp_path / "face.png")
    command = ["restore", str(tmp_path / "face.png"), "-o", str(tmp_path / "out"), "--aligned", "--model", NAME]
    assert main([*command, "--no-identity-guidance"]) == 0
    with Image.open(tmp_path / "out" / "face.png") as restored:
        assert restored.size == (128, 128)
    assert main(["info", NAME]) == 0
    assert capsys.readouterr().out.startswith(f"{NAME}: 6.94 M parameters")
