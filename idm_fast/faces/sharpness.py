"""Measures of a face region: how sharp it is, and how much of its finest detail is noise.

All of them work on luma in 0..1 of the inner part of the face's crop, where skin, eyes and mouth are: ``face_luma``.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional as F

from idm_fast.faces.align import AlignedFace

FloatArray = npt.NDArray[np.float32]

LUMA = (0.299, 0.587, 0.114)  # Rec. 601
_INNER = 0.62  # side of the measured square, as a fraction of the crop's: forehead to chin
_BLOCKS = 12  # blocks a side in which noise is measured
_MIN_PERIODS = 8  # fewer steps of the JPEG grid than that, and chance looks like blocks
_FLAT_SHARE = 0.25


def sharpness(luma: FloatArray) -> float:
    """Root mean square of the 4-neighbour Laplacian of ``luma`` [h, w]: the strength of the finest detail.

    Noise counts as detail here, so compare pictures of equal noise. 0 below 3 x 3 pixels.
    """
    if min(luma.shape) < 3:
        return 0.0
    around = luma[:-2, 1:-1] + luma[2:, 1:-1] + luma[1:-1, :-2] + luma[1:-1, 2:]
    return float(np.sqrt(np.square(4.0 * luma[1:-1, 1:-1] - around, dtype=np.float64).mean()))


def high_band(pixels: FloatArray, face: AlignedFace, size: int) -> FloatArray:
    """Luma of the face less what a crop of ``size`` pixels can hold: the band that a network of that size never sees.

    Its mean square is the energy that a paste must not lose. Empty band (the face is smaller than ``size``): zeros.
    """
    luma = torch.from_numpy(face_luma(pixels, face))[None, None]
    ratio = size / face.native_px
    if ratio >= 1.0:
        return np.zeros(luma.shape[2:], dtype=np.float32)
    small = (max(1, round(luma.shape[2] * ratio)), max(1, round(luma.shape[3] * ratio)))
    low = F.interpolate(luma, size=small, mode="bicubic", antialias=True, align_corners=False)
    low = F.interpolate(low, size=luma.shape[2:], mode="bicubic", align_corners=False)
    band: FloatArray = (luma - low)[0, 0].numpy()
    return band


def grain(luma: FloatArray) -> float:
    """Standard deviation (0..1) of white noise in a face's ``luma`` [h, w]; 0.002 to 0.006 for a clean photograph.

    The mask [[1,-2,1],[-2,4,-2],[1,-2,1]] ignores edges and smooth shades (Immerkaer 1996); its mean size in the
    flattest quarter of the face's blocks is the noise's. Blind to noise that was enlarged with the picture.
    """
    if min(luma.shape) < 8:
        return 0.0
    rows = luma[:-2] - 2.0 * luma[1:-1] + luma[2:]
    mask = np.abs(rows[:, :-2] - 2.0 * rows[:, 1:-1] + rows[:, 2:])
    block = max(4, min(mask.shape) // _BLOCKS)
    height, width = (side // block for side in mask.shape)
    if height == 0 or width == 0:
        return 0.0
    tiles = mask[: height * block, : width * block].reshape(height, block, width, block).mean(axis=(1, 3))
    # The mask multiplies white noise by 6; sqrt(pi / 2) turns the mean of |x| into a standard deviation.
    return flat_level(tiles) * math.sqrt(math.pi / 2.0) / 6.0


def flat_level(energy: FloatArray) -> float:
    """Below it lies the flattest quarter of the blocks, which shows noise rather than detail: a quantile of ``energy``.

    As ``numpy.quantile``, in a tenth of its time.
    """
    ordered = np.sort(energy, axis=None).tolist()
    place = _FLAT_SHARE * (len(ordered) - 1)
    below = int(place)
    above = min(below + 1, len(ordered) - 1)
    return float(ordered[below] + (place - below) * (ordered[above] - ordered[below]))


def blockiness(pixels: FloatArray, face: AlignedFace) -> float:
    """Height (0..1) of the luma steps on an 8-pixel grid, as JPEG leaves them; 0 when the face is too small to tell.

    The mean step at one shift of the grid, less the largest at any other shift: only a compressed picture has one
    shift that stands out. About 0.004 at JPEG quality 80, 0.007 at 40, 0.017 at 10.
    """
    luma = face_luma(pixels, face)
    worst = 0.0
    for plane in (luma, luma.T):
        if plane.shape[1] < 8 * _MIN_PERIODS:
            continue
        steps = np.abs(np.diff(plane, axis=1)).mean(axis=0)
        columns = np.sort(steps[: len(steps) // 8 * 8].reshape(-1, 8).mean(axis=0))
        worst = max(worst, float(columns[-1] - columns[-2]))
    return worst


def face_luma(pixels: FloatArray, face: AlignedFace, inner: float = _INNER) -> FloatArray:
    """Luma [h, w] of the upright box around the middle of the face's crop, clipped to the picture."""
    x, y = face.corners.mean(axis=0)
    # Eyes to mouth lie below the crop's middle in the template, by about a twentieth of its side.
    half = face.native_px * inner / 2.0
    height, width = pixels.shape[:2]
    x0, x1 = _span(x - half, x + half, width)
    y0, y1 = _span(y - half, y + half, height)
    luma: FloatArray = pixels[y0:y1, x0:x1] @ np.array(LUMA, dtype=np.float32)
    return luma


def _span(low: float, high: float, limit: int) -> tuple[int, int]:
    first = min(max(math.floor(low), 0), limit - 1)
    return first, max(min(math.ceil(high), limit), first + 1)
