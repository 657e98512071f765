"""From a picture to crops and back: the few calls that a restorer needs.

faces = find_faces(picture)
crops = crops_of(picture, faces, 256)                    # [N, 3, 256, 256] in -1..1, for the network
picture, faces = upscaled(picture, faces, 2)             # optional
picture = paste_faces(picture, faces, restored_crops)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional as F

from idm_fast.errors import IdmFastError
from idm_fast.faces.align import TEMPLATE, WHOLE, AlignedFace, crop_face, locate
from idm_fast.faces.detect import Face, shared_detector
from idm_fast.faces.paste import ColorMatch, paste
from idm_fast.images import Picture
from idm_fast.images.limits import check_size

FloatArray = npt.NDArray[np.float32]
Detector = Callable[[FloatArray], list[Face]]

WHICH = ("all", "largest", "center")


def find_faces(picture: Picture, detector: Detector | None = None, which: str = "all") -> list[AlignedFace]:
    """Faces of a picture with their crops' geometry, largest first; an empty list when there are none.

    ``detector``: a callable from pixels to faces, the shared CenterFace when None.
    ``which``: "all", "largest" (by box), or "center" (box centre nearest the picture's centre).
    """
    if which not in WHICH:
        raise IdmFastError(f"find_faces: which must be one of {', '.join(WHICH)}, got {which!r}")
    found = sorted((detector or shared_detector())(picture.pixels), key=lambda face: -face.area)
    if which == "center" and found:
        middle = np.array([picture.width / 2, picture.height / 2])
        found = [min(found, key=lambda face: float(np.hypot(*(np.array(face.center) - middle))))]
    elif which == "largest":
        found = found[:1]
    return [locate(face) for face in found]


def whole_picture(picture: Picture) -> AlignedFace:
    """The face of a picture that is itself one aligned crop. Raises ``IdmFastError`` when it is not square."""
    side = picture.width
    if picture.height != side:
        actual = f"{picture.width} x {picture.height}"
        raise IdmFastError(f"{picture.path or 'picture'}: an aligned face must be a square picture, got {actual}")
    face = Face((0.0, 0.0, float(side), float(side)), 1.0, (TEMPLATE * side).astype(np.float32))
    transform = np.array([[1.0 / side, 0.0, 0.0], [0.0, 1.0 / side, 0.0]])
    return AlignedFace(face, transform, float(side), float(side), WHOLE)


def crop_of(picture: Picture, face: AlignedFace, size: int) -> torch.Tensor:
    """One face's crop, float32 [3, size, size], RGB, -1..1."""
    if size < 8:
        raise IdmFastError(f"crop_of: size must be at least 8, got {size}")
    return crop_face(picture.pixels, face, size)


def crops_of(picture: Picture, faces: Sequence[AlignedFace], size: int) -> torch.Tensor:
    """The faces' crops, float32 [N, 3, size, size], RGB, -1..1; N may be 0."""
    if not faces:
        return torch.empty(0, 3, size, size)
    return torch.stack([crop_of(picture, face, size) for face in faces])


def paste_faces(
    picture: Picture,
    faces: Sequence[AlignedFace],
    crops: Sequence[torch.Tensor] | torch.Tensor,
    *,
    originals: Sequence[torch.Tensor] | torch.Tensor | None = None,
    blend: float | Sequence[float] = 1.0,
    color: ColorMatch = "low",
    detail: Literal["auto"] | float = "auto",
    aligned: bool = False,
) -> Picture:
    """A copy of the picture with the restored ``crops`` in place; see ``paste`` for the options.

    ``aligned``: the picture is one aligned crop, all of which is replaced, without a feathered edge.
    """
    pixels = paste(
        picture.pixels, crops, faces, originals=originals, blend=blend, color=color, detail=detail, feather=not aligned
    )
    return picture.with_pixels(pixels)


def upscaled(picture: Picture, faces: Sequence[AlignedFace], factor: float) -> tuple[Picture, list[AlignedFace]]:
    """The picture resized by ``factor`` (antialiased bicubic, alpha too) and the faces' places in it.

    Raises ``IdmFastError`` when the factor is not positive or the result would exceed the size limits.
    """
    if not 0.0 < factor < float("inf"):
        raise IdmFastError(f"upscaled: factor must be a positive number, got {factor}")
    if factor == 1.0:
        return picture, list(faces)
    width, height = max(1, round(picture.width * factor)), max(1, round(picture.height * factor))
    check_size(width, height, f"{picture.path or 'picture'} enlarged {factor:g} times")
    alpha = None if picture.alpha is None else _resize(picture.alpha[..., None], height, width)[..., 0]
    large = replace(picture, pixels=_resize(picture.pixels, height, width), alpha=alpha, notes=list(picture.notes))
    return large, [face.scaled(width / picture.width, height / picture.height) for face in faces]


def _resize(planes: FloatArray, height: int, width: int) -> FloatArray:
    """[H, W, c] to [height, width, c]; plane by plane, which bounds the extra memory."""
    out = np.empty((height, width, planes.shape[2]), dtype=np.float32)
    for channel in range(planes.shape[2]):
        plane = torch.from_numpy(np.ascontiguousarray(planes[..., channel]))[None, None]
        resized = F.interpolate(plane, size=(height, width), mode="bicubic", antialias=True, align_corners=False)
        out[..., channel] = resized[0, 0].clamp_(0.0, 1.0).numpy()
    return out
