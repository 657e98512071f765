"""Cuts a face out of a picture in the FFHQ framing that every network here is trained on.

The geometry (``locate``) and the resampling (``crop_face``) are apart, because the crop's size is chosen after the
face's own size is known. Coordinates are continuous: the first pixel spans 0..1, its centre is 0.5.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional as F

from idm_fast.faces.detect import Face

FloatArray = npt.NDArray[np.float32]
Float64Array = npt.NDArray[np.float64]

# FFHQ-512 positions of left eye, right eye, nose tip, left and right mouth corner, as fractions of the crop's side.
TEMPLATE: Float64Array = (
    np.array(
        [
            [192.98138, 239.94708],
            [318.90277, 240.1936],
            [256.63416, 314.01935],
            [201.26117, 371.41043],
            [313.08905, 371.15118],
        ]
    )
    / 512.0
)
TEMPLATE.flags.writeable = False

# Measured on whole photographs (group, portrait, three-quarter and profile views, 80 faces): the residual of a frontal
# face is 0.011 (rms, fraction of the crop's side), of a profile up to 0.113; the crop's side is 1.5 to 2.3 times the
# box's mean side, in the middle 1.64; the centres of crop and box differ by at most 0.28 box sides.
_VISIBLE_RESIDUAL = 0.045  # above it, look for one landmark that is off ...
_OUTLIER_GAIN = 3.0  # ... which is one without which the other four fit this many times better
_MAX_RESIDUAL = 0.16
_SIDE_RANGE = (1.1, 3.2)  # crop's side in mean box sides; outside, the landmarks are wrong and the box is the guide
_CENTER_RANGE = 0.5  # distance between the centres of crop and box, in mean box sides
_SIDE_PER_BOX = 1.64
_BOX_CENTER_V = 0.57  # where the box's centre lies in the template, as a fraction of its height


WHOLE = "whole picture"


@dataclass(frozen=True, eq=False)
class AlignedFace:
    """Where a face's square crop lies in the picture.

    ``transform``: float64 [2, 3], similarity from picture pixels to the unit square (0, 0)-(1, 1) of the crop.
    ``native_px``: side of the crop in picture pixels. ``source_px``: the same in the picture as it came, before any
    enlargement. ``method``: what the transform was fitted to: "landmarks", "four landmarks" (one was far off), "box"
    (they made no sense) or ``WHOLE`` (the picture is itself a crop).
    """

    face: Face
    transform: Float64Array
    native_px: float
    source_px: float
    method: str

    @functools.cached_property
    def inverse(self) -> Float64Array:
        """[2, 3] from the unit square to picture pixels."""
        linear = np.linalg.inv(self.transform[:, :2])
        return np.concatenate([linear, -(linear @ self.transform[:, 2:])], axis=1)

    @functools.cached_property
    def corners(self) -> Float64Array:
        """[4, 2] (x, y) of the crop's corners in the picture, clockwise from its top left."""
        unit = np.array([[0.0, 0.0], [1.0, 0.0], [1.0, 1.0], [0.0, 1.0]])
        return apply(self.inverse, unit)

    def is_whole(self, shape: tuple[int, ...], size: int) -> bool:
        """Whether a crop of ``size`` pixels is a picture of ``shape`` [H, W, ...] itself, pixel for pixel."""
        whole = self.method == WHOLE and self.native_px == self.source_px == size
        return whole and tuple(shape[:2]) == (size, size)

    def landmarks(self, size: int) -> FloatArray:
        """[5, 2] (x, y) of the landmarks in a crop of ``size`` pixels."""
        points: FloatArray = (apply(self.transform, self.face.landmarks) * size).astype(np.float32)
        return points

    def scaled(self, factor_x: float, factor_y: float) -> AlignedFace:
        """The same face in the picture enlarged by the two factors (equal but for rounding of the size)."""
        factors = np.array([factor_x, factor_y])
        x0, y0, x1, y1 = self.face.box
        face = Face(
            (x0 * factor_x, y0 * factor_y, x1 * factor_x, y1 * factor_y),
            self.face.score,
            (self.face.landmarks * factors).astype(np.float32),
        )
        transform = self.transform.copy()
        transform[:, :2] /= factors
        return replace(self, face=face, transform=transform, native_px=self.native_px * math.sqrt(factor_x * factor_y))


def apply(transform: Float64Array, points: npt.NDArray[np.floating]) -> Float64Array:
    """Points [n, 2] through an affine transform [2, 3]."""
    moved: Float64Array = points.astype(np.float64) @ transform[:, :2].T + transform[:, 2]
    return moved


def fit_similarity(points: npt.NDArray[np.floating], target: Float64Array) -> tuple[Float64Array, float]:
    """Least-squares rotation, scale and shift [2, 3] that takes ``points`` [n, 2] to ``target``, and its rms residual.

    Solved in the linear form x' = a x - b y + c, y' = b x + a y + d, which cannot mirror, whatever the points are.
    A degenerate set (all points equal) gives scale 0.
    """
    source = points.astype(np.float64)
    mean_source, mean_target = source.mean(axis=0), target.mean(axis=0)
    s, t = source - mean_source, target - mean_target
    spread = float((s * s).sum())
    if spread <= 0.0:
        a = b = 0.0
    else:
        a = float((s * t).sum()) / spread
        b = float((s[:, 0] * t[:, 1] - s[:, 1] * t[:, 0]).sum()) / spread
    linear = np.array([[a, -b], [b, a]])
    transform = np.concatenate([linear, (mean_target - linear @ mean_source)[:, None]], axis=1)
    residual = apply(transform, source) - target
    return transform, float(np.sqrt((residual**2).sum(axis=1).mean()))


def locate(face: Face) -> AlignedFace:
    """The crop of ``face``: by its five landmarks, by four if one is far off, by the box if they make no sense.

    A profile face, whose landmarks lie on a narrow strip, still gets a plain rotation and scale; a fit whose crop
    disagrees with the detected box in size or place, or leaves a large residual, is given up for the box.
    """
    transform, residual = fit_similarity(face.landmarks, TEMPLATE)
    method = "landmarks"
    if residual > _VISIBLE_RESIDUAL:
        rest = [np.delete(np.arange(5), i) for i in range(5)]
        four = min((fit_similarity(face.landmarks[keep], TEMPLATE[keep]) for keep in rest), key=lambda fit: fit[1])
        if four[1] * _OUTLIER_GAIN < residual and _plausible(face, *four):
            transform, residual = four
            method = "four landmarks"
    if not _plausible(face, transform, residual):
        return _from_box(face)
    return AlignedFace(face, transform, _side(transform), _side(transform), method)


def _side(transform: Float64Array) -> float:
    return 1.0 / max(math.hypot(transform[0, 0], transform[1, 0]), 1e-12)


def _plausible(face: Face, transform: Float64Array, residual: float) -> bool:
    """Whether the crop agrees with the detected box in size and place and the landmarks fit at all."""
    box_side = math.sqrt(max(face.area, 1e-6))
    ratio = _side(transform) / box_side
    if residual > _MAX_RESIDUAL or not _SIDE_RANGE[0] <= ratio <= _SIDE_RANGE[1]:
        return False
    center = apply(transform, np.array([face.center]))[0]
    return float(np.hypot(*(center - 0.5))) * ratio <= _CENTER_RANGE


def _from_box(face: Face) -> AlignedFace:
    """An upright crop around the box."""
    side = _SIDE_PER_BOX * math.sqrt(max(face.area, 1.0))
    x, y = face.center
    transform = np.array([[1.0 / side, 0.0, 0.5 - x / side], [0.0, 1.0 / side, _BOX_CENTER_V - y / side]])
    return AlignedFace(face, transform, side, side, "box")


def align(pixels: FloatArray, face: Face, size: int) -> tuple[torch.Tensor, AlignedFace]:
    """The crop of ``face`` (float32 [3, size, size], RGB, -1..1) and where it lies in ``pixels`` [H, W, 3] (0..1)."""
    aligned = locate(face)
    return crop_face(pixels, aligned, size), aligned


_MARGIN = 3  # output pixels around the crop, so that the antialias filter sees real neighbours
_MAX_OVERSAMPLING = 4


def crop_face(pixels: FloatArray, aligned: AlignedFace, size: int) -> torch.Tensor:
    """Resamples the face's square from ``pixels`` (float32 [H, W, 3], 0..1) to float32 [3, size, size] in -1..1.

    When the crop shrinks the picture it is first sampled (bicubic) about as densely as the picture and then reduced
    by an antialiased bicubic filter, so fine texture is averaged and never aliased. Only the region of interest is
    touched; beyond the picture's border it is mirrored.
    """
    if aligned.is_whole(pixels.shape, size):  # sampled at the pixels' own centres: the pixels themselves
        crop = torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))
        return crop.clamp(0.0, 1.0).mul_(2.0).sub_(1.0)
    oversampling = max(1, math.ceil(aligned.native_px / size - 0.05))
    step = 1
    if oversampling > _MAX_OVERSAMPLING:  # a huge face: average whole blocks first, so that the work stays bounded
        step = oversampling // 2
        oversampling = max(1, math.ceil(aligned.native_px / (size * step) - 0.05))
    side = size + 2 * _MARGIN
    steps = (torch.arange(side * oversampling, dtype=torch.float64) + 0.5) / oversampling
    unit = (steps - _MARGIN) / size
    region, (x0, y0, width, height) = _region(pixels, aligned, margin=_MARGIN / size, extra=3 * step)
    if step > 1:
        region = F.avg_pool2d(region, step, ceil_mode=True, count_include_pad=False)
        width, height = region.shape[3] * step, region.shape[2] * step
    (a, b, c), (d, e, f) = aligned.inverse.tolist()
    x = a * unit[None, :] + b * unit[:, None] + c
    y = d * unit[None, :] + e * unit[:, None] + f
    grid = torch.stack([2.0 * (x - x0) / width - 1.0, 2.0 * (y - y0) / height - 1.0], dim=-1).float()
    crop = F.grid_sample(region, grid[None], mode="bicubic", padding_mode="reflection", align_corners=False)
    if oversampling > 1:
        crop = F.interpolate(crop, size=(side, side), mode="bicubic", antialias=True, align_corners=False)
    crop = crop[0, :, _MARGIN:-_MARGIN, _MARGIN:-_MARGIN]
    return crop.clamp(0.0, 1.0).mul_(2.0).sub_(1.0).contiguous()


def _region(
    pixels: FloatArray, aligned: AlignedFace, margin: float, extra: int
) -> tuple[torch.Tensor, tuple[int, int, int, int]]:
    """The part of the picture around the crop as [1, 3, h, w], and its (x0, y0, w, h)."""
    spread = 1.0 + 2.0 * margin
    corners = (aligned.corners - aligned.corners.mean(axis=0)) * spread + aligned.corners.mean(axis=0)
    height, width = pixels.shape[:2]
    # Never empty: a crop that lies wholly outside still mirrors the nearest rows and columns.
    x0 = min(max(math.floor(corners[:, 0].min()) - extra, 0), width - 1)
    y0 = min(max(math.floor(corners[:, 1].min()) - extra, 0), height - 1)
    x1 = max(min(math.ceil(corners[:, 0].max()) + extra, width), x0 + 1)
    y1 = max(min(math.ceil(corners[:, 1].max()) + extra, height), y0 + 1)
    part = np.ascontiguousarray(pixels[y0:y1, x0:x1].transpose(2, 0, 1))
    return torch.from_numpy(part)[None], (x0, y0, x1 - x0, y1 - y0)
