"""What ``Restorer.restore`` gives back."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from idm_fast.faces.align import AlignedFace
from idm_fast.images import Picture, write_image


@dataclass(frozen=True, eq=False)
class RestoredFace:
    """One face of a result: ``box`` (x0, y0, x1, y1) and ``landmarks`` [5, 2] in pixels of the upright
    input, ``score`` of the detector, ``native_px`` side of its aligned crop, ``model`` that restored it in ``steps``
    steps."""

    box: tuple[float, float, float, float]
    landmarks: np.ndarray
    score: float
    native_px: float
    model: str
    steps: int


@dataclass(frozen=True, eq=False)
class Result:
    """A restored picture.

    ``image``: of the asked-for type. ``picture``: with everything that the input had (16 bits, alpha, profile).
    ``faces``: largest first. ``milliseconds``: this picture's share of "detect", "network" and "paste".
    ``notes``: what was special, in words. ``changed``: False where no face was found and nothing was enlarged, so that
    every pixel is the input's.
    """

    image: Any
    picture: Picture
    faces: list[RestoredFace]
    milliseconds: dict[str, float]
    notes: list[str] = field(default_factory=list)
    changed: bool = True

    @property
    def steps(self) -> int:
        """Sampling steps of a face (the most, where models differ); 0 without a face."""
        return max((face.steps for face in self.faces), default=0)

    def save(self, path: str | Path) -> list[str]:
        """Writes ``picture`` in the format of the extension, whole or not at all; returns notes on what was lost.

        Keeps 16 bits, alpha, EXIF and colour profile where the format can, which saving ``image`` does not. Raises
        ``IdmFastError`` where the file cannot be written.
        """
        return write_image(self.picture, path)


def as_output(picture: Picture, output_type: str) -> Any:
    """``picture`` as "pil" (8 bit), "np" (uint8, or uint16 of a 16-bit picture) or "picture" (itself)."""
    if output_type == "picture":
        return picture
    if output_type == "np":
        return picture.to_array()
    image = Image.fromarray(picture.to_array(8))
    # Pillow writes them with most formats when the image is saved; without its profile a picture changes colour.
    image.info |= {key: data for key, data in (("icc_profile", picture.icc), ("exif", picture.exif)) if data}
    return image


def describe(face: AlignedFace, model: str, steps: int) -> RestoredFace:
    found = face.face
    return RestoredFace(found.box, found.landmarks, found.score, face.native_px, model, steps)
