"""Puts restored crops back into the picture: region of interest only, feathered, colour-matched, any overlap.

With O the picture, C the crop that went into the network, R the crop that came out, and U the resampling from crop to
picture, a face contributes

    change = U(R' - C) - (1 - gain) * (O - U(C)),      picture + mask * blend * change

where R' is R with the low frequencies of C (colour match) and ``gain`` says how much of the original's own detail
beyond the crop's resolution is kept (``detail.py``): 1 unless that band is noise. In a clean picture a network that
changes nothing therefore changes no pixel, and a face larger than the network's crop keeps its finest detail whatever
the network does.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional as F

from idm_fast.errors import IdmFastError
from idm_fast.faces.align import AlignedFace, crop_face
from idm_fast.faces.detail import HALO, band_noise, detail_gain, keep_sharper
from idm_fast.faces.resize import resize_crops
from idm_fast.faces.sharpness import blockiness

FloatArray = npt.NDArray[np.float32]
ColorMatch = Literal["low", "mean", "none"]

# The mask is a rounded square: a fourth-power norm of the position, 0 at the crop's centre and 1 at mid-side.
_MASK_FULL = 0.70  # inside, the restored face counts fully
_MASK_EDGE = 0.98  # outside, not at all
_LOW_BANDS = 8  # the colour match moves what an 8 x 8 thumbnail of the crop can hold
_OVERSAMPLING = 2  # points a pixel and axis, for a face smaller than its crop
_FILTER_MARGIN = 2  # px that the reducing filter reaches out
_LARGE = 0.75  # a face from this share of its crop's size on has detail of its own in the crop
_STRIP_PIXELS = 2_000_000  # pixels worked on at a time, which bounds memory for huge faces
_NOISE_PIXELS = 600  # side of the patch in which a large face's noise is measured


def paste(
    pixels: FloatArray,
    crops: Sequence[torch.Tensor] | torch.Tensor,
    faces: Sequence[AlignedFace],
    *,
    originals: Sequence[torch.Tensor] | torch.Tensor | None = None,
    blend: float | Sequence[float] = 1.0,
    color: ColorMatch = "low",
    detail: Literal["auto"] | float = "auto",
    feather: bool = True,
) -> FloatArray:
    """A copy of ``pixels`` (float32 [H, W, 3], RGB, 0..1) with every restored face in its place.

    ``crops``: restored faces [3, S, S], RGB, -1..1; sizes may differ. ``originals``: what the network was given for
    each, resampled again when None (needed when ``pixels`` was enlarged after cropping). ``blend``: 0 keeps the
    picture, 1 the restored face; a list has one for each face. ``color``: "low" keeps the original's shading and colour
    at the coarsest scale, "mean" only its mean colour, "none" neither. ``detail``: gain of the original's detail beyond
    the crop, "auto" to measure whether it is detail or noise, or a number from 0 to 1. ``feather``: False replaces each
    crop up to its very edge, for a picture that is itself one crop.

    Where crops overlap, each pixel goes to the face whose centre is nearest in its own scale, with a smooth change
    from one to the other, so the result does not depend on the order.
    """
    blends = [blend] * len(faces) if isinstance(blend, int | float) else list(blend)
    _check(crops, faces, originals, blends, color, detail)
    out = pixels.copy()
    for index, (crop, face) in enumerate(zip(crops, faces, strict=True)):
        before = crop_face(pixels, face, crop.shape[-1]) if originals is None else originals[index]
        x0, y0, x1, y1 = bounds = _bounds(face, pixels.shape)
        if x0 == x1 or y0 == y1 or blends[index] == 0.0:
            continue
        change = _Change(
            pixels, crop.detach().cpu().float(), before.detach().cpu().float(), face, bounds, color, detail
        )
        rivals = [other for other in faces if other is not face and _overlap(face, other)]
        rows = max(16, _STRIP_PIXELS // max(x1 - x0, 1))
        for top in range(y0, y1, rows):
            bottom = min(top + rows, y1)
            delta = change.at(x0, top, x1, bottom).mul_(blends[index])
            if feather:
                delta *= _mask(face, rivals, x0, top, x1, bottom)
            out[top:bottom, x0:x1] += delta.permute(1, 2, 0).numpy()
    return np.clip(out, 0.0, 1.0, out=out)


@dataclass
class _Change:
    """The change that one face makes, for any part of the picture."""

    pixels: FloatArray
    crop: torch.Tensor
    before: torch.Tensor
    face: AlignedFace
    bounds: tuple[int, int, int, int]
    color: ColorMatch
    detail: Literal["auto"] | float

    def __post_init__(self) -> None:
        size = self.crop.shape[-1]
        matched = _match_color(self.crop, self.before, self.color)
        self.blocks = blockiness(self.pixels, self.face) if self.detail == "auto" else 0.0
        if self.detail == "auto" and self.face.source_px > _LARGE * size:
            matched = keep_sharper(matched, self.before, self.blocks)
        self.is_whole = self.face.is_whole(self.pixels.shape, size)
        if self.is_whole:  # the crop holds all of the picture, pixel for pixel
            self.planes, self.whole, self.noise = ((matched - self.before) * 0.5)[None], None, 0.0
            return
        # -1..1 to 0..1, as the picture; one resampling serves the change and the crop itself.
        planes = torch.cat([(matched - self.before) * 0.5, (self.before + 1.0) * 0.5])[None]
        # A face smaller than the crop is reduced in two steps, or the network's detail would alias: here to twice the
        # picture's density, then from there by ``_resample``. (In one step to the same density it would blur.)
        self.oversampling = 1 if self.face.native_px > 0.95 * size else _OVERSAMPLING
        dense = math.ceil(self.face.native_px * _OVERSAMPLING)
        if self.oversampling > 1 and dense < size:
            planes = F.interpolate(planes, size=(dense, dense), mode="bicubic", antialias=True, align_corners=False)
        self.planes = planes
        x0, y0, x1, y1 = self.bounds
        small = (x1 - x0) * (y1 - y0) <= _STRIP_PIXELS
        # The bands of all of a small face serve the measurement and the result; a huge face is done part by part.
        self.whole = self._compute_bands(x0, y0, x1, y1) if small else None
        self.noise = self._measure() if self.detail == "auto" else 0.0

    def at(self, x0: int, y0: int, x1: int, y1: int) -> torch.Tensor:
        """[3, y1 - y0, x1 - x0], 0..1 scale."""
        if self.is_whole:  # no band lies beyond it
            return self.planes[0, :, y0:y1, x0:x1].clone()
        if self.detail == 1.0 or (self.detail == "auto" and self.noise == 0.0):
            return self._bands(x0, y0, x1, y1)[0].clone()
        # Context around the part, so that strips of one face meet without a step.
        low_x, low_y, high_x, high_y = self.bounds
        left, top = max(x0 - HALO, low_x), max(y0 - HALO, low_y)
        right, bottom = min(x1 + HALO, high_x), min(y1 + HALO, high_y)
        change, high = self._bands(left, top, right, bottom)
        gain = detail_gain(high, self.noise) if self.detail == "auto" else torch.tensor(float(self.detail))
        change = change - (1.0 - gain) * high
        return change[:, y0 - top : y1 - top, x0 - left : x1 - left].contiguous()

    def _bands(self, x0: int, y0: int, x1: int, y1: int) -> tuple[torch.Tensor, torch.Tensor]:
        """U(R' - C) and the high band O - U(C), each [3, h, w], in a part of the face's region."""
        if self.whole is None:
            return self._compute_bands(x0, y0, x1, y1)
        left, top = self.bounds[:2]
        change, high = (band[:, y0 - top : y1 - top, x0 - left : x1 - left] for band in self.whole)
        return change, high

    def _compute_bands(self, x0: int, y0: int, x1: int, y1: int) -> tuple[torch.Tensor, torch.Tensor]:
        both = self._resample(self.planes, x0, y0, x1, y1)
        part = torch.from_numpy(np.ascontiguousarray(self.pixels[y0:y1, x0:x1].transpose(2, 0, 1)))
        return both[:3], part - both[3:]

    def _resample(self, planes: torch.Tensor, x0: int, y0: int, x1: int, y1: int) -> torch.Tensor:
        """Planes [1, c, s, s] of the crop at the pixels of a part of the picture: [c, y1 - y0, x1 - x0]."""
        k = self.oversampling
        margin = 0 if k == 1 else _FILTER_MARGIN
        grid = _unit_grid(self.face, x0 - margin, y0 - margin, x1 + margin, y1 + margin, k)
        points = torch.stack(grid, dim=-1)[None]
        found = F.grid_sample(planes, points, mode="bicubic", padding_mode="border", align_corners=False)
        if k > 1:
            size = (found.shape[2] // k, found.shape[3] // k)
            found = F.interpolate(found, size=size, mode="bicubic", antialias=True, align_corners=False)
            found = found[:, :, margin:-margin, margin:-margin]
        return found[0]

    def _measure(self) -> float:
        """Noise level of the high band in the face's middle."""
        x, y = self.face.corners.mean(axis=0)
        half = min(self.face.native_px * 0.35, _NOISE_PIXELS / 2)
        low_x, low_y, high_x, high_y = self.bounds
        x0, x1 = max(math.floor(x - half), low_x), min(math.ceil(x + half), high_x)
        y0, y1 = max(math.floor(y - half), low_y), min(math.ceil(y + half), high_y)
        if x1 - x0 < 8 or y1 - y0 < 8:
            return 0.0
        _, high = self._bands(x0, y0, x1, y1)
        octaves = math.log2(max(self.face.source_px / self.crop.shape[-1], 1.0))
        return band_noise(high, octaves, self.blocks)


def _unit_grid(
    face: AlignedFace, x0: int, y0: int, x1: int, y1: int, density: int = 1
) -> tuple[torch.Tensor, torch.Tensor]:
    """Positions of the pixels' centres in the crop, -1..1 from side to side: two tensors [y1 - y0, x1 - x0].

    With ``density`` k, of k x k points in each pixel: k times as many rows and columns.
    """
    (a, b, c), (d, e, f) = (2.0 * face.transform - np.array([[0.0, 0.0, 1.0], [0.0, 0.0, 1.0]])).tolist()
    x = (torch.arange((x1 - x0) * density, dtype=torch.float64)[None, :] + 0.5) / density + x0
    y = (torch.arange((y1 - y0) * density, dtype=torch.float64)[:, None] + 0.5) / density + y0
    return (a * x + (b * y + c)).float(), (d * x + (e * y + f)).float()


def _distance(face: AlignedFace, x0: int, y0: int, x1: int, y1: int) -> torch.Tensor:
    """0 at the crop's centre, 1 at the middle of its sides; squares with round corners."""
    u, v = _unit_grid(face, x0, y0, x1, y1)
    return (u.square_().square_() + v.square_().square_()).sqrt_().sqrt_()


def _feather(distance: torch.Tensor) -> torch.Tensor:
    t = ((_MASK_EDGE - distance) / (_MASK_EDGE - _MASK_FULL)).clamp_(0.0, 1.0)
    return t * t * (3.0 - 2.0 * t)


def _mask(face: AlignedFace, rivals: Sequence[AlignedFace], x0: int, y0: int, x1: int, y1: int) -> torch.Tensor:
    """This face's share [h, w] of each pixel, 0..1; the shares of all faces add up to the strongest mask among them."""
    distance = _distance(face, x0, y0, x1, y1)
    mask = _feather(distance)
    if not rivals:
        return mask
    strongest, own = mask.clone(), mask * _nearness(distance)
    total = own.clone()
    for rival in rivals:
        other = _distance(rival, x0, y0, x1, y1)
        other_mask = _feather(other)
        torch.maximum(strongest, other_mask, out=strongest)
        total += other_mask * _nearness(other)
    return strongest * own / total.clamp_(min=1e-12)


def _nearness(distance: torch.Tensor) -> torch.Tensor:
    """Weight of a face at a pixel; steep, so that a face's middle stays its own under a neighbour's crop."""
    return (1.0 - distance).clamp_(0.0, 1.0).pow_(3) + 1e-6


def _match_color(crop: torch.Tensor, before: torch.Tensor, how: ColorMatch) -> torch.Tensor:
    """``crop`` with the coarsest bands of ``before``; both [3, S, S]."""
    if how == "none":
        return crop
    difference = before - crop
    if how == "mean":
        return crop + difference.mean(dim=(1, 2), keepdim=True)
    size = crop.shape[-1]
    low = resize_crops(difference, min(_LOW_BANDS, size), mode="bilinear", antialias=True)
    return crop + resize_crops(low, size, mode="bicubic")


def _bounds(face: AlignedFace, shape: tuple[int, ...]) -> tuple[int, int, int, int]:
    """(x0, y0, x1, y1) of the crop in the picture, clipped; empty when it lies outside."""
    low, high = face.corners.min(axis=0), face.corners.max(axis=0)
    x0, x1 = max(math.floor(low[0]), 0), min(math.ceil(high[0]), shape[1])
    y0, y1 = max(math.floor(low[1]), 0), min(math.ceil(high[1]), shape[0])
    return x0, y0, max(x1, x0), max(y1, y0)


def _overlap(one: AlignedFace, other: AlignedFace) -> bool:
    low = np.maximum(one.corners.min(axis=0), other.corners.min(axis=0))
    high = np.minimum(one.corners.max(axis=0), other.corners.max(axis=0))
    return bool((high > low).all())


def _check(
    crops: Sequence[torch.Tensor] | torch.Tensor,
    faces: Sequence[AlignedFace],
    originals: Sequence[torch.Tensor] | torch.Tensor | None,
    blends: Sequence[float],
    color: str,
    detail: object,
) -> None:
    if len(blends) != len(faces):
        raise IdmFastError(f"paste: blend must be a number or one for each face = {len(faces)}, got {len(blends)}")
    if len(crops) != len(faces) or (originals is not None and len(originals) != len(faces)):
        count = len(crops) if len(crops) != len(faces) or originals is None else len(originals)
        raise IdmFastError(f"paste: crops and originals must be one for each face = {len(faces)}, got {count}")
    for crop in crops:
        if crop.ndim != 3 or crop.shape[0] != 3 or crop.shape[1] != crop.shape[2]:
            raise IdmFastError(f"paste: crops must be [3, size, size], got {list(crop.shape)}")
        if not math.isfinite(
            float(crop.sum(dtype=torch.float64))
        ):  # one pass without a mask; NaN and infinity both survive a sum
            raise IdmFastError("paste: crops must be finite, got NaN or infinite values from the network")
    for blend in blends:
        if not 0.0 <= blend <= 1.0:
            raise IdmFastError(f"paste: blend must be from 0 to 1, got {blend}")
    if color not in ("low", "mean", "none"):
        raise IdmFastError(f"paste: color must be low, mean or none, got {color!r}")
    if detail != "auto" and not (isinstance(detail, int | float) and 0.0 <= detail <= 1.0):
        raise IdmFastError(f'paste: detail must be "auto" or from 0 to 1, got {detail!r}')
