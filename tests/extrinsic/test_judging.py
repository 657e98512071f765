"""Models of rounds side by side: figures face by face, changes, and judging that was stopped."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from idm_fast.checkpoints import native
from idm_fast.errors import IdmFastError
from idm_fast.evaluation.metrics import FaceMetrics
from idm_fast.training import judging
from idm_fast.training.rounds import JudgeSettings, digest


@pytest.fixture
def faces(tmp_path: Path) -> Path:
    folder = tmp_path / "faces"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i in range(4):
        coarse = Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8))
        coarse.resize((48, 48), Image.Resampling.BICUBIC).save(folder / f"{i}.png")
    rows = [f"{i}.png,{'train' if i < 1 else 'val'},200\n" for i in range(4)]
    (folder / "faces.csv").write_text("file,split,native_px\n" + "".join(rows))
    return folder


@pytest.fixture(scope="module")
def _metrics() -> None:
    try:
        FaceMetrics()
    except IdmFastError as error:
        pytest.skip(str(error))


@pytest.fixture
def folders(tiny_model: Path, tmp_path: Path) -> tuple[Path, Path]:
    """Those of two models, R_0 and one that restores a little less well."""
    found = tmp_path / "round-0", tmp_path / "round-1"
    loaded = native.load(tiny_model)
    for folder in found:
        folder.mkdir()
        native.save(folder / "model.safetensors", loaded.module, loaded.config, {}, torch.float32)
        with torch.no_grad():
            loaded.module.out_conv.bias += 0.05
    return found


def _judge(folder: Path, settings: JudgeSettings, faces: Path, first: Path | None = None, **more: Any) -> Any:
    sha256s = [digest(each / "model.safetensors") if each else None for each in (folder, first)]
    key = judging.key(settings, faces, str(sha256s[0]), sha256s[1])
    judging.judge(folder, folder.name, settings, faces, key, device=torch.device("cpu"), first=first, **more)
    return key


@pytest.mark.usefixtures("_metrics")
def test_two_models_on_the_same_faces(faces: Path, folders: tuple[Path, Path]) -> None:
    settings = JudgeSettings(levels=("mild", "severe"), steps=(1, 2), limit=3)
    judging.check(settings, faces)
    zero, one = folders
    key = _judge(zero, settings, faces)
    figures = judging.read(zero, key)
    assert figures is not None
    rows = figures["report"]["rows"]
    assert [(row["level"], row["name"], row["steps"]) for row in rows] == [
        (level, name, steps)
        for level in ("mild", "severe")
        for name, steps in (("round-0", 1), ("round-0", 2), ("degraded input", None))
    ]
    assert figures["report"]["conditions"]["faces"] == 3
    assert figures["report"]["conditions"]["crop_px"] == 32
    assert rows[2]["metrics"]["psnr"]["mean"] > rows[5]["metrics"]["psnr"]["mean"]
    assert figures["changes"] == []

    other = judging.read(one, _judge(one, settings, faces, zero))
    assert other is not None
    assert {row["name"] for row in other["report"]["rows"]} == {"round-1"}
    metrics = {(row["level"], row["steps"]): row["metrics"] for row in [*rows, *other["report"]["rows"]]}
    before = {(row["level"], row["steps"]): row["metrics"] for row in rows}
    for row in other["changes"]:
        place = row["level"], row["steps"]
        for name in ("psnr", "ssim", "lpips_alex", "recognition"):
            change = row["metrics"][name]
            assert change["mean"] == pytest.approx(metrics[place][name]["mean"] - before[place][name]["mean"], abs=1e-6)
            assert change["low"] <= change["mean"] <= change["high"]
        assert row["metrics"]["psnr"]["mean"] < 0  # it is lighter than it should be
        ratio = metrics[place]["fd_vgg"]["mean"] / before[place]["fd_vgg"]["mean"]
        assert row["metrics"]["fd_vgg"]["mean"] == pytest.approx(100 * (ratio - 1), abs=1e-3)
    values = judging.load_values(one)
    assert values["mild/2/psnr"].shape == (3,)
    assert values["mild/2/fd_vgg"].shape == values["clean/fd_vgg"].shape
    assert sorted(path.name for path in one.iterdir()) == ["figures.json", "model.safetensors", "values.safetensors"]


@pytest.mark.usefixtures("_metrics")
def test_judging_goes_on_where_it_stopped(
    faces: Path, folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(judging, "evaluate", partial(judging.evaluate, batch_size=1))
    zero, settings, batches = folders[0], JudgeSettings(steps=(1,)), []
    real = judging.Parts.get_or
    monkeypatch.setattr(judging.Parts, "get_or", lambda self, name, make: real(self, name, lambda: made(name, make)))

    def made(name: str, make: Any) -> Any:
        batches.append(name)
        return make()

    def stop() -> None:
        raise KeyboardInterrupt

    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            _judge(zero, settings, faces, between=stop)
    (zero / "judging-of-something-else").mkdir()
    key = _judge(zero, settings, faces)
    assert batches == ["faces-000000", "faces-000001", "faces-000002"]  # none of them twice
    figures = judging.read(zero, key)
    assert sorted(path.name for path in zero.iterdir()) == ["figures.json", "model.safetensors", "values.safetensors"]
    _judge(zero, settings, faces)
    assert judging.read(zero, key) == figures
    assert len(batches) == 6


@pytest.mark.usefixtures("_metrics")
def test_figures_of_something_else_are_not_taken(faces: Path, folders: tuple[Path, Path]) -> None:
    zero, settings = folders[0], JudgeSettings(steps=(1,), limit=2)
    key = _judge(zero, settings, faces)
    assert judging.read(zero, key) is not None
    sha256 = key["model"]
    for other in (
        judging.key(settings, faces, "0" * 64, None),
        judging.key(settings, faces, sha256, "0" * 64),
        judging.key(replace(settings, levels=("mild",)), faces, sha256, None),
        judging.key(replace(settings, steps=(2,)), faces, sha256, None),
        judging.key(replace(settings, limit=3), faces, sha256, None),
    ):
        assert judging.read(zero, other) is None
    (zero / "values.safetensors").unlink()
    with pytest.raises(IdmFastError, match=r"values\.safetensors: must be the figures face by face"):
        judging.load_values(zero)
    assert judging.read(zero, key) is None
    (zero / "figures.json").write_text("{half")
    assert judging.read(zero, key) is None


@pytest.mark.usefixtures("_metrics")
def test_faces_to_judge_on_are_needed(faces: Path) -> None:
    (faces / "faces.csv").write_text("file,split,native_px\n0.png,train,200\n")
    with pytest.raises(
        IdmFastError, match="faces: no face of split 'val' with native_px >= 0; models are judged on these"
    ):
        judging.check(JudgeSettings(), faces)
