"""Landmark distance: its definition, and what the detector makes of a face that moves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from idm_fast.errors import IdmFastError
from idm_fast.evaluation.landmarks import Landmarks, landmark_distance
from idm_fast.faces.detect import Face
from idm_fast.training.data import list_faces, load_crop

POINTS = torch.tensor([[40.0, 50.0], [80.0, 50.0], [60.0, 70.0], [45.0, 95.0], [75.0, 95.0]], dtype=torch.float64)


def test_a_shifted_face_is_the_shift_away() -> None:
    moved = torch.stack([POINTS, POINTS + torch.tensor([3.0, 4.0]), POINTS.clone()])
    moved[2, 4] += torch.tensor([0.0, 10.0])  # one point of five
    expected = [0, 100 * 5 / 40, 100 * 10 / 5 / 40]  # the eyes are 40 px apart
    assert landmark_distance(moved, POINTS.expand(3, 5, 2)).tolist() == pytest.approx(expected)


def test_a_face_that_is_not_found_has_no_distance() -> None:
    lost = torch.full((1, 5, 2), torch.nan, dtype=torch.float64)
    assert landmark_distance(lost, POINTS[None]).isnan().all()
    assert landmark_distance(POINTS[None], lost).isnan().all()
    with pytest.raises(ValueError, match="landmark_distance: points must match clean"):
        landmark_distance(POINTS[None], POINTS.expand(2, 5, 2))


class FakeDetector:
    """Finds nothing in black pictures, and two faces in others: the smaller one with the better score."""

    def __call__(self, pixels: np.ndarray[Any, Any]) -> list[Face]:
        if pixels.max() == 0:
            return []
        small = Face((0, 0, 10, 10), 0.9, np.zeros((5, 2), dtype=np.float32))
        return [small, Face((0, 0, 90, 90), 0.6, POINTS.numpy().astype(np.float32))]


def test_the_largest_face_counts() -> None:
    images = torch.stack([torch.zeros(3, 8, 8), torch.full((3, 8, 8), -1.0)])
    found = Landmarks(FakeDetector())(images)  # type: ignore[arg-type]
    torch.testing.assert_close(found[0], POINTS)
    assert found[1].isnan().all()


def test_the_detector_sees_a_real_face_move(shared_data: Path) -> None:
    try:
        landmarks = Landmarks()
    except IdmFastError as error:
        pytest.skip(str(error))
    faces = [load_crop(face.path, 128) for face in list_faces(shared_data / "faces256", "val")[:6]]
    shift = 16

    def on_canvas(left: int) -> Tensor:
        canvas = torch.zeros(len(faces), 3, 192, 192)
        canvas[:, :, 32:160, left : left + 128] = torch.stack(faces)
        return canvas

    clean = landmarks(on_canvas(32))
    expected = 100 * shift / torch.linalg.vector_norm(clean[:, 0] - clean[:, 1], dim=1)
    found = landmark_distance(landmarks(on_canvas(32 + shift)), clean)
    # A network that halves five times is not blind to where its grid lies: a few per cent of the eyes' distance.
    assert (found - expected).abs().max() < 0.05 * 100
    assert (found - expected).abs().mean() < 0.02 * 100
