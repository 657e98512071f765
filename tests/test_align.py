"""The crop's geometry and resampling."""

from __future__ import annotations

import csv
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from idm_fast.faces.align import TEMPLATE, AlignedFace, align, apply, crop_face, fit_similarity, locate
from idm_fast.faces.detect import Face
from idm_fast.images import read_image


def face_at(x: float, y: float, side: float, degrees: float = 0.0) -> Face:
    """A face whose crop is the square of ``side`` pixels around (x, y), turned by ``degrees``."""
    angle = math.radians(degrees)
    turn = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    landmarks = (TEMPLATE - 0.5) * side @ turn.T + [x, y]
    middle = np.array([0.0, 0.07]) * side @ turn.T + [x, y]
    half = side / 1.64 / 2
    box = (middle[0] - half, middle[1] - half, middle[0] + half, middle[1] + half)
    return Face(tuple(float(v) for v in box), 0.9, landmarks.astype(np.float32))  # type: ignore[arg-type]


def waves(height: int, width: int, period: float) -> np.ndarray:
    """A smooth test picture [height, width, 3] in 0..1."""
    y, x = np.mgrid[:height, :width] + 0.5
    wave = 0.5 + 0.2 * np.sin(2 * np.pi * x / period) + 0.2 * np.cos(2 * np.pi * y / period)
    return np.stack([wave, wave.clip(0, 1) ** 2, 1 - wave], axis=2).astype(np.float32)


@pytest.mark.parametrize("degrees", [0, 20, -75, 180])
@pytest.mark.parametrize("side", [30.0, 256.0, 900.0])
def test_locate_finds_the_square(side: float, degrees: float) -> None:
    found = locate(face_at(400, 300, side, degrees))
    assert found.method == "landmarks"
    assert found.native_px == pytest.approx(side, rel=1e-3)
    np.testing.assert_allclose(found.corners.mean(axis=0), [400, 300], atol=0.01 * side)
    np.testing.assert_allclose(apply(found.transform, found.inverse[:, 2][None]), [[0, 0]], atol=1e-9)


def test_one_bad_landmark_is_left_out() -> None:
    face = face_at(200, 200, 200)
    face.landmarks[3] += [55, -40]
    found = locate(face)
    assert found.method == "four landmarks"
    assert found.native_px == pytest.approx(200, rel=0.01)


def test_a_profile_is_neither_mirrored_nor_blown_up() -> None:
    face = face_at(200, 200, 200)
    face.landmarks[:, 0] = 170 + 0.15 * (face.landmarks[:, 0] - 200)  # all on a narrow strip at the box's left
    found = locate(face)
    assert np.linalg.det(found.transform[:, :2]) > 0
    assert 120 < found.native_px < 320


@pytest.mark.parametrize("kind", ["mirrored", "one point", "far away", "not finite size"])
def test_senseless_landmarks_fall_back_to_the_box(kind: str) -> None:
    face = face_at(200, 200, 200)
    if kind == "mirrored":
        face.landmarks[:] = face.landmarks[[1, 0, 2, 4, 3]]
    elif kind == "one point":
        face.landmarks[:] = 200
    elif kind == "far away":
        face.landmarks[:] += 400
    else:
        face.landmarks[:] *= 40
    found = locate(face)
    assert found.method == "box"
    assert found.native_px == pytest.approx(200, rel=0.02)
    np.testing.assert_allclose(found.corners.mean(axis=0), [200, 200], atol=3)


def test_fit_similarity_is_exact_and_never_mirrors() -> None:
    rng = np.random.default_rng(0)
    points = rng.random((5, 2)) * 100
    transform, residual = fit_similarity(points, points * 2 + [3, 4])
    np.testing.assert_allclose(transform, [[2, 0, 3], [0, 2, 4]], atol=1e-9)
    assert residual < 1e-9
    transform, _ = fit_similarity(points * [-1, 1], points)
    assert np.linalg.det(transform[:, :2]) >= 0


def test_an_aligned_square_is_returned_unchanged() -> None:
    """Half-pixel convention: the identity transform must return the very pixels."""
    rng = np.random.default_rng(0)
    pixels = rng.random((64, 64, 3), dtype=np.float32)
    crop, found = align(pixels, face_at(32, 32, 64), 64)
    assert found.native_px == pytest.approx(64, rel=1e-4)
    np.testing.assert_allclose(crop.permute(1, 2, 0).numpy(), pixels * 2 - 1, atol=2e-3)


@pytest.mark.parametrize("native", [40.0, 127.0, 300.0, 700.0])
@pytest.mark.parametrize("degrees", [0.0, 30.0])
def test_crop_samples_the_right_places(native: float, degrees: float) -> None:
    """A slow wave, sampled at the crop's own positions, is what the crop must hold, at every scale and angle."""
    size, period = 64, 260.0
    face = locate(face_at(601.3, 598.8, native, degrees))
    crop = crop_face(waves(1200, 1200, period), face, size)
    unit = (np.arange(size) + 0.5) / size
    grid = np.stack(np.meshgrid(unit, unit), axis=-1).reshape(-1, 2)
    x, y = apply(face.inverse, grid).T
    wave = 0.5 + 0.2 * np.sin(2 * np.pi * x / period) + 0.2 * np.cos(2 * np.pi * y / period)
    np.testing.assert_allclose(crop[0].reshape(-1).numpy(), 2 * wave - 1, atol=0.012)


def test_shrinking_averages_fine_texture() -> None:
    pixels = np.indices((512, 512)).sum(axis=0) % 2
    checker = np.repeat(pixels[..., None], 3, axis=2).astype(np.float32)
    for native in (200.0, 480.0):
        crop = crop_face(checker, locate(face_at(256, 256, native, 7)), 64)
        assert float(crop.abs().max()) < 0.03  # mid-grey is 0


def test_outside_the_picture_is_mirrored() -> None:
    pixels = waves(100, 100, 70)
    crop = crop_face(pixels, locate(face_at(5, 5, 120)), 64)
    assert bool(torch.isfinite(crop).all())
    middle = round((5 - (5 - 60)) / 120 * 64)  # the crop's position of the picture's border is 5 px further left
    border = (0 - (5 - 60)) / 120 * 64
    left, right = crop[0, middle, int(border) - 4], crop[0, middle, int(2 * border) - int(border) + 4]
    assert abs(float(left - right)) < 0.1
    for shape in ((1, 1), (2, 300), (300, 1)):
        assert crop_face(np.ones((*shape, 3), np.float32), locate(face_at(0, 0, 80)), 32).min() > 0.99


def test_training_crops_realign_to_themselves(shared_data: Path) -> None:
    with (shared_data / "faces256" / "faces.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))[:400]
    columns = [f"{point}_{axis}" for point in ("leye", "reye", "nose", "lmouth", "rmouth") for axis in "xy"]
    sides, shifts = [], []
    for row in rows:
        points = np.array([float(row[column]) for column in columns]).reshape(5, 2)
        transform, _ = fit_similarity(points, TEMPLATE)
        sides.append(1 / math.hypot(*transform[:, 0]))
        shifts.append(apply(transform, np.array([[128.0, 128.0]]))[0] - 0.5)
    assert np.median(sides) == pytest.approx(256, rel=0.02)
    np.testing.assert_allclose(np.median(shifts, axis=0), [0, 0], atol=0.01)
    # Cut again by landmarks that are exactly the template's, a crop is itself.
    pixels = read_image(shared_data / "faces256" / rows[0]["file"]).pixels
    crop, _ = align(pixels, face_at(128, 128, 256), 256)
    assert float(np.abs((crop.permute(1, 2, 0).numpy() + 1) / 2 - pixels).max()) < 0.01


def test_scaled_face_lies_in_the_same_place() -> None:
    found = locate(face_at(50, 40, 60, 10))
    large = found.scaled(3.0, 3.0)
    np.testing.assert_allclose(large.corners, found.corners * 3, rtol=1e-6)
    assert (large.native_px, large.source_px) == (pytest.approx(180, rel=1e-3), pytest.approx(60, rel=1e-3))
    assert isinstance(large, AlignedFace)
