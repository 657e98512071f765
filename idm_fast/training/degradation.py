"""y = resize_up(jpeg_q(resize_down_r(x0 * k) + noise_delta)): turns sharp faces into the inputs a restorer meets.

The classical degradation of blind face restoration (METHODS: GFPGAN, IDM and others), every number scaled from
512 px to the working size. ``degrade`` draws its parameters at random for training; ``degrade_level`` is the fixed
test degradation. Both are pure functions of their seed. Whatever changes the pixels of ``degrade_level`` must raise
``DEGRADATION_VERSION``, which every results file carries.
"""

from __future__ import annotations

import io
import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from numpy.random import Generator
from PIL import Image
from torch import Tensor

from idm_fast.errors import IdmFastError

FloatArray = npt.NDArray[np.float32]

DEGRADATION_VERSION = 1

_RESIZERS = (Image.Resampling.BOX, Image.Resampling.BILINEAR, Image.Resampling.BICUBIC)


@dataclass(frozen=True)
class Level:
    """Ranges of one strength, for a face of 128 px: (low, high) of each draw.

    ``blur``: Gaussian sigma in pixels. ``down``: down-scale factor. ``noise``: standard deviation of 255, after
    down-scaling. ``quality``: JPEG quality. For a face of S px, with s = S / 128, blur becomes s x blur and down
    1 + s x (down - 1): a given level then leaves about as much of the face, and "not down-scaled" stays that.
    """

    blur: tuple[float, float]
    down: tuple[float, float]
    noise: tuple[float, float]
    quality: tuple[int, int]


LEVELS = {
    "mild": Level(blur=(0.3, 0.9), down=(1.0, 1.8), noise=(0.0, 5.0), quality=(70, 95)),
    "medium": Level(blur=(0.8, 1.8), down=(2.0, 3.0), noise=(3.0, 10.0), quality=(50, 80)),
    "severe": Level(blur=(1.5, 3.0), down=(3.5, 6.0), noise=(8.0, 18.0), quality=(35, 60)),
}
TRAINING = Level(blur=(0.1, 3.5), down=(1.0, 7.0), noise=(0.0, 20.0), quality=(30, 100))


def degrade_level(x0: Tensor, level: str, seed: int) -> Tensor:
    """The fixed test degradation of ``x0`` [3, S, S] in [-1, 1] -> the same shape and range.

    ``level``: a key of ``LEVELS``; ``seed``: the picture's own. Gaussian blur, box/bilinear/bicubic down-scaling,
    white noise, JPEG, bicubic up-scaling.
    """
    if level not in LEVELS:
        raise IdmFastError(f"level must be one of {sorted(LEVELS)}, got {level!r}")
    return _apply(x0, LEVELS[level], np.random.default_rng(seed), varied=False)


def degrade_photo(x0: Tensor, level: str, seed: int, face_px: float) -> Tensor:
    """A whole photograph [3, H, W] in [-1, 1], spoiled so that a face of ``face_px`` pixels looks like ``level``."""
    if level not in LEVELS:
        raise IdmFastError(f"level must be one of {sorted(LEVELS)}, got {level!r}")
    if not face_px > 0:
        raise IdmFastError(f"degrade: face_px must be > 0, got {face_px}")
    return _apply(x0, LEVELS[level], np.random.default_rng(seed), varied=False, face_px=face_px)


def degrade(x0: Tensor, rng: Generator) -> Tensor:
    """A random training degradation of ``x0`` [3, S, S] in [-1, 1]; the strength itself is drawn first.

    One in ten pictures is left nearly untouched, so that the model learns to leave a good face alone.
    """
    if rng.random() < 0.1:
        return _apply(x0, LEVELS["mild"], rng, varied=False)
    strength = rng.random()
    t = TRAINING
    level = Level(
        blur=(t.blur[0], t.blur[0] + strength * (t.blur[1] - t.blur[0])),
        down=(t.down[0], t.down[0] + strength * (t.down[1] - t.down[0])),
        noise=(t.noise[0], t.noise[0] + strength * (t.noise[1] - t.noise[0])),
        quality=(int(t.quality[1] - strength * (t.quality[1] - t.quality[0])), t.quality[1]),
    )
    return _apply(x0, level, rng, varied=True)


def _apply(x0: Tensor, level: Level, rng: Generator, varied: bool, face_px: float | None = None) -> Tensor:
    square = "S, S" if face_px is None else "H, W"
    fits = x0.ndim == 3 and x0.shape[0] == 3 and min(x0.shape) > 0 and x0.is_floating_point()
    if not fits or min(x0.shape[1:]) < 8 or (face_px is None and x0.shape[1] != x0.shape[2]):
        raise IdmFastError(
            f"degrade: x0 must be a float [3, {square}] of at least 8 pixels, got {x0.dtype} {list(x0.shape)}"
        )
    if not torch.isfinite(x0).all():
        raise IdmFastError("degrade: x0 must be finite, got nan or inf")
    x0 = x0.to("cpu", torch.float32)
    height, width = x0.shape[1:]
    scale = (face_px or width) / 128
    sigma = scale * rng.uniform(*level.blur)
    kernel = _random_kernel(sigma, rng) if varied else _gaussian_kernel(sigma, sigma, 0.0)
    down = 1 + scale * (rng.uniform(*level.down) - 1)
    resizer = _RESIZERS[rng.integers(3)]
    noise = rng.uniform(*level.noise)
    quality = int(rng.integers(level.quality[0], level.quality[1] + 1))

    x = _filter(x0, kernel)
    small_size = (max(8, round(width / down)), max(8, round(height / down)))
    picture: FloatArray = ((x + 1) * 127.5).permute(1, 2, 0).numpy()
    small = _resize(picture, small_size, resizer)
    deviation = noise * np.ones_like(small[..., :1])
    if varied and rng.random() < 0.3:  # signal-dependent part, as from photon counts
        deviation = deviation * np.sqrt(np.clip(small.mean(-1, keepdims=True), 16, 255) / 128)
    grey_noise = varied and rng.random() < 0.2
    drawn = rng.standard_normal((*small.shape[:2], 1 if grey_noise else 3)).astype(np.float32)
    small = small + deviation * drawn
    coded = Image.fromarray(np.clip(small + 0.5, 0, 255).astype(np.uint8))
    if varied and rng.random() < 0.01:
        coded = coded.convert("L").convert("RGB")
    buffer = io.BytesIO()
    coded.save(buffer, "JPEG", quality=quality)
    decoded = np.asarray(Image.open(buffer).convert("RGB"), dtype=np.float32)
    full = _resize(decoded, (width, height), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.clip(full, 0, 255) / 127.5 - 1).permute(2, 0, 1).contiguous()


def _resize(picture: FloatArray, size: tuple[int, int], resizer: Image.Resampling) -> FloatArray:
    """[H, W, 3] float32 to the (width, height) ``size`` without rounding: Pillow resizes float planes one by one."""
    if (picture.shape[1], picture.shape[0]) == size:
        return picture.astype(np.float32)
    planes = [Image.fromarray(picture[..., c].astype(np.float32)).resize(size, resizer) for c in range(3)]
    return np.stack([np.asarray(plane) for plane in planes], axis=-1)


def _gaussian_kernel(sigma_x: float, sigma_y: float, angle: float) -> Tensor:
    """Normalised [K, K] Gaussian with the given axes (pixels) turned by ``angle`` (radians); K odd, 3 sigma wide."""
    radius = max(1, math.ceil(3 * max(sigma_x, sigma_y)))
    axis = torch.arange(-radius, radius + 1, dtype=torch.float32)
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    u = math.cos(angle) * x + math.sin(angle) * y
    v = -math.sin(angle) * x + math.cos(angle) * y
    kernel = torch.exp(-0.5 * ((u / max(sigma_x, 1e-3)) ** 2 + (v / max(sigma_y, 1e-3)) ** 2))
    return kernel / kernel.sum()


def _random_kernel(sigma: float, rng: Generator) -> Tensor:
    """Mostly Gaussian, round or stretched; now and then motion blur or a defocus disk of like spread."""
    kind = rng.random()
    angle = rng.uniform(0, math.pi)
    if kind < 0.05:
        return _gaussian_kernel(2 * sigma, 0.2, angle)
    if kind < 0.10:
        radius = 1.6 * sigma + 0.5
        reach = math.ceil(radius)
        axis = torch.arange(-reach, reach + 1, dtype=torch.float32)
        distance = (axis[:, None] ** 2 + axis[None, :] ** 2).sqrt()
        disk = (radius + 0.5 - distance).clamp(0, 1)
        return disk / disk.sum()
    if kind < 0.5:
        return _gaussian_kernel(sigma, sigma * rng.uniform(0.4, 1.0), angle)
    return _gaussian_kernel(sigma, sigma, 0.0)


def _filter(x: Tensor, kernel: Tensor) -> Tensor:
    """``x`` [3, H, W] convolved with ``kernel`` [K, K], borders mirrored."""
    radius = kernel.shape[0] // 2
    padded = F.pad(x[None], (radius,) * 4, mode="reflect")
    return F.conv2d(padded.transpose(0, 1), kernel[None, None])[:, 0]
