"""The public class on pictures made here and, where they are, on real photographs."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from idm_fast import registry
from idm_fast.checkpoints import native
from idm_fast.compare import side_by_side
from idm_fast.config import DiffusionConfig, ModelConfig, UNetConfig
from idm_fast.errors import IdmFastError
from idm_fast.images import Picture, picture_from_array, read_image
from idm_fast.models.unet import UNet
from idm_fast.registry import shipped
from idm_fast.restorer import Restorer

needs_weights = pytest.mark.skipif(not shipped(), reason="no weights under idm_fast/weights")


@pytest.fixture(scope="module")
def restorer() -> Restorer:
    if not shipped():
        pytest.skip("no weights under idm_fast/weights")
    return Restorer.from_pretrained("idm-face")


@pytest.fixture(scope="module")
def tiny(tiny_model: Path) -> Restorer:
    return Restorer.from_pretrained(tiny_model, dtype="fp32")


@pytest.fixture
def face() -> np.ndarray:
    return (np.random.default_rng(0).random((128, 128, 3)) * 255).astype(np.uint8)


QUICK: dict[str, Any] = {"aligned": True, "num_inference_steps": 2, "output_type": "np"}


def test_an_aligned_face_keeps_size_and_type(restorer: Restorer, face: np.ndarray) -> None:
    result = restorer.restore(face, **QUICK)
    assert result.image.shape == face.shape
    assert result.image.dtype == np.uint8
    assert result.steps == 2
    assert len(result.faces) == 1
    assert result.changed
    assert set(result.milliseconds) == {"detect", "network", "paste"}
    assert all(value >= 0 for value in result.milliseconds.values())


def test_the_model_is_chosen_by_the_size_that_will_be_shown(restorer: Restorer, face: np.ndarray) -> None:
    quick = {"aligned": True, "num_inference_steps": 1}
    assert restorer.restore(face, **quick).faces[0].model == "idm-face-128"
    larger = restorer.restore(face, upscale=2, **quick)
    assert (larger.faces[0].model, larger.image.size) == ("idm-face-256", (256, 256))


def test_a_batch_equals_its_singles(restorer: Restorer, face: np.ndarray) -> None:
    faces = [face, face[::-1].copy(), face[:, ::-1].copy()]
    together = restorer.restore(faces, batch_size=3, **QUICK)
    alone = [restorer.restore(one, **QUICK) for one in faces]
    for a, b in zip(together, alone, strict=True):
        # bf16 products may be summed in another order for another batch: one grey level, not another picture.
        assert np.abs(a.image.astype(int) - b.image.astype(int)).max() <= 3


def test_pictures_of_many_kinds_share_a_batch(tiny: Restorer, face: np.ndarray) -> None:
    """Order, size, depth and channels of each are kept, and its result is the one it has alone."""
    deep = face.astype(np.uint16) * 257
    with_alpha = np.dstack([face[:40, :40], np.full((40, 40), 77, np.uint8)])
    pictures: list[Any] = [face[:64, :64], deep, with_alpha, face[..., 0], Image.fromarray(face[:33, :33])]
    for batch_size in (1, 2, 8):
        together = tiny.restore(iter(pictures), batch_size=batch_size, **QUICK)
        for picture, result in zip(pictures, together, strict=True):
            alone = tiny.restore(picture, **QUICK).image
            assert (result.image.shape, result.image.dtype) == (np.asarray(picture).shape, np.asarray(picture).dtype)
            scale = 257 if alone.dtype == np.uint16 else 1
            assert np.abs(result.image.astype(int) - alone.astype(int)).max() <= scale
    assert (together[2].image[..., 3] == 77).all()


def test_the_seed_decides_the_picture(restorer: Restorer, face: np.ndarray) -> None:
    first, again, other = (restorer.restore(face, seed=seed, **QUICK).image for seed in (1, 1, 2))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_a_generator_is_a_seed(tiny: Restorer, face: np.ndarray) -> None:
    def restored(**how: Any) -> np.ndarray:
        image: np.ndarray = tiny.restore(face, **QUICK, **how).image
        return image

    assert np.array_equal(restored(generator=5), restored(seed=5))
    stream = torch.Generator().manual_seed(7)
    first, second = restored(generator=stream), restored(generator=stream)
    assert not np.array_equal(first, second)  # a stream goes on
    assert np.array_equal(first, restored(generator=torch.Generator().manual_seed(7)))
    with pytest.raises(IdmFastError, match="generator must be"):
        restored(generator="seven")


def test_blend_zero_is_the_input(restorer: Restorer, face: np.ndarray) -> None:
    result = restorer.restore(face, aligned=True, num_inference_steps=1, blend=0.0, output_type="np")
    assert np.array_equal(result.image, face)


def test_a_picture_without_a_face_comes_back_with_a_note(tiny: Restorer) -> None:
    grey = np.full((96, 160, 3), 128, np.uint8)
    result = tiny.restore(grey, output_type="np")
    assert np.array_equal(result.image, grey)
    assert result.faces == []
    assert result.steps == 0
    assert not result.changed
    assert "no face found" in result.notes
    larger = tiny.restore(grey, upscale=2.0, output_type="np")
    assert larger.image.shape == (192, 320, 3)
    assert larger.changed


def test_a_result_saves_all_that_the_picture_held(tiny: Restorer, face: np.ndarray, tmp_path: Path) -> None:
    picture = picture_from_array(np.dstack([face, face[..., :1]]).astype(np.uint16) * 257)
    picture.icc = b"a profile"
    result = tiny.restore(picture, aligned=True)
    assert result.image.mode == "RGBA"
    assert result.image.info["icc_profile"] == b"a profile"
    assert result.save(tmp_path / "x.png") == []
    kept = read_image(tmp_path / "x.png")
    assert (kept.bit_depth, kept.icc) == (16, b"a profile")
    assert kept.alpha is not None
    assert any("16-bit" in note for note in result.save(tmp_path / "x.jpg"))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"num_inference_steps": 0}, "steps must be an integer >= 1, got 0"),
        ({"num_inference_steps": 2.5}, "steps must be an integer >= 1, got 2.5"),
        ({"sampler": "magic"}, "magic"),
        ({"strength": 0.0}, "strength"),
        ({"blend": 1.5}, "blend"),
        ({"blend": "all"}, "blend must be a number"),
        ({"blend": float("nan")}, "blend"),
        ({"upscale": 0.5}, "upscale"),
        ({"face": "nose"}, "nose"),
        ({"output_type": "jpeg"}, "jpeg"),
        ({"seed": -1}, "seed"),
        ({"seed": 1.5}, "seed must be a whole number"),
        ({"batch_size": 0}, "batch_size"),
        ({"batch_size": True}, "batch_size"),
        ({"eta": 2.0}, "eta"),
        ({"eta": 0.5, "sampler": "heun"}, "eta of heun"),
    ],
)
def test_wrong_options_are_named_before_any_picture_is_read(
    tiny: Restorer, options: dict[str, object], said: str
) -> None:
    with pytest.raises(IdmFastError, match=said):
        tiny.restore(["gone.png"], **({"aligned": True} | options))  # type: ignore[arg-type]
    with pytest.raises(IdmFastError, match=said):
        tiny.restore([], **({"aligned": True} | options))  # type: ignore[arg-type]


def test_wrong_pictures_are_refused_by_name(tiny: Restorer, face: np.ndarray) -> None:
    bad = np.zeros((64, 64, 3), np.float32)
    bad[3, 5] = np.nan
    with pytest.raises(IdmFastError, match="row 3, column 5"):
        tiny.restore(bad)
    with pytest.raises(IdmFastError, match=r"images\[1\].*int32"):
        tiny.restore([face, np.zeros((8, 8, 3), np.int32)])
    with pytest.raises(IdmFastError, match=r"images\[0\] must be a path"):
        tiny.restore([object()])  # type: ignore[list-item]
    with pytest.raises(IdmFastError, match="image must be a path"):
        tiny.restore(None)  # type: ignore[arg-type]
    with pytest.raises(IdmFastError, match="square picture, got 128 x 64"):
        tiny.restore(face[:64], aligned=True)


@needs_weights
def test_unknown_models_devices_and_dtypes_are_named(tmp_path: Path) -> None:
    with pytest.raises(IdmFastError, match="no-such-model"):
        Restorer.from_pretrained("no-such-model")
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(b"not a model")
    with pytest.raises(IdmFastError, match=r"broken\.safetensors"):
        Restorer.from_pretrained(broken)
    with pytest.raises(IdmFastError, match="abacus"):
        Restorer.from_pretrained("idm-face", device="abacus")
    with pytest.raises(IdmFastError, match="fp8"):
        Restorer.from_pretrained("idm-face", dtype="fp8")
    with pytest.raises(IdmFastError, match="fp16"):
        Restorer.from_pretrained("idm-face", device="cpu", dtype="fp16")


def test_a_family_without_weights_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(registry, "WEIGHTS", tmp_path)
    with pytest.raises(IdmFastError, match="idm-face: weights must lie in"):
        Restorer.from_pretrained("idm-face")


def test_a_network_that_takes_no_picture_is_refused(tmp_path: Path) -> None:
    unet = UNetConfig(image_size=16, model_channels=8, channel_mult=(1,), num_res_blocks=(1,), norm_groups=4)
    config = ModelConfig("dreamer", unet, DiffusionConfig())
    native.save(tmp_path / "dreamer.safetensors", UNet(unet), config, {}, torch.float32)
    with pytest.raises(IdmFastError, match=r"dreamer\.safetensors: model must be conditioned .* got dreamer"):
        Restorer.from_pretrained(tmp_path / "dreamer.safetensors")


@pytest.mark.parametrize(
    ("backend", "said"),
    [("xformers", "as in xformers,torch"), ("cuda", "cuda,torch"), ("abacus", "abacus"), ("", "backend must be")],
)
def test_a_backend_that_cannot_do_it_all_is_refused_at_once(tiny_model: Path, backend: str, said: str) -> None:
    with pytest.raises(IdmFastError, match=said):
        Restorer.from_pretrained(tiny_model, device="cpu", backend=backend)


def test_backends_may_be_a_list(tiny_model: Path, tiny: Restorer, face: np.ndarray) -> None:
    for backend in ("torch", "reference", "cpu,torch"):
        forced = Restorer.from_pretrained(tiny_model, device="cpu", dtype="fp32", backend=backend)
        other, own = forced.restore(face, **QUICK).image, tiny.restore(face, **QUICK).image
        assert np.abs(other.astype(int) - own.astype(int)).max() <= 1


def test_the_steps_of_a_result_are_those_of_the_model_that_ran(tiny: Restorer, face: np.ndarray) -> None:
    small, large = (copy.copy(tiny.models[0]) for _ in range(2))
    small.config = replace(small.config, name="small", steps=7, unet=replace(small.config.unet, image_size=16))
    assert (small.size, large.size) == (16, 32)
    result = Restorer([small, large]).restore(face[:32, :32], aligned=True)
    assert (result.faces[0].model, result.steps) == ("tiny", 3)


def test_a_comparison_is_never_too_large_to_write() -> None:
    wide = Picture(np.zeros((3, 40_000, 3), np.float32), alpha=np.zeros((3, 40_000), np.float32), icc=b"profile")
    sheet = side_by_side(wide, wide)
    assert sheet.width < 30_000
    assert sheet.icc == b"profile"
    assert sheet.pixels[-1].min() == 1.0  # what is transparent shows white
    assert side_by_side(Picture(np.zeros((1, 1, 3), np.float32)), wide).width == sheet.width


def test_a_large_sharp_face_is_not_softened(restorer: Restorer, shared_data: Path) -> None:
    """A 545-px face, undegraded: its high band must survive (within 5 %)."""
    from idm_fast.faces.sharpness import LUMA, sharpness

    picture = read_image(shared_data / "photos" / "portrait_glasses.jpg")
    result = restorer.restore(picture, output_type="picture")
    assert len(result.faces) == 1
    x0, y0, x1, y1 = (int(v) for v in result.faces[0].box)
    before, after = (sharpness(p.pixels[y0:y1, x0:x1] @ np.array(LUMA, np.float32)) for p in (picture, result.picture))
    assert after >= 0.95 * before


def test_every_face_of_a_group_is_restored(restorer: Restorer, shared_data: Path) -> None:
    result = restorer.restore(shared_data / "photos" / "three_quarter_view.jpg", num_inference_steps=1)
    assert len(result.faces) == 7
    assert isinstance(result.image, Image.Image)
    largest = restorer.restore(shared_data / "photos" / "three_quarter_view.jpg", num_inference_steps=1, face="largest")
    assert len(largest.faces) == 1
    assert largest.faces[0].native_px == max(face.native_px for face in result.faces)
