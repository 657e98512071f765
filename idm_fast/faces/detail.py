"""How much of a face's own finest detail to keep when a network's crop replaces the rest.

A crop of ``size`` pixels cannot hold the detail of a larger face. What it leaves out of the original,
``original - resampled crop``, is the *high band*. A sharp photograph must keep it (or a large face would come back
softer than it went in); in a damaged one it is noise and compression artefacts, which the restored face must lose.

The gain is a Wiener filter, ``1 - noise / energy`` at each pixel, where ``energy`` is the local mean square of the
band and ``noise`` its level in the flattest quarter of the face, counted only as far as it is too strong for skin:
natural texture has about the same energy in each octave, so the limit grows with the octaves of the band. On clean
photographs the level is 0.3 to 1.3 (of 255) per root octave and the gain is 1 everywhere; from 3.5 on it is the full
Wiener gain: eyes and hair stay, flat noisy skin is left to the network.
"""

from __future__ import annotations

import math

import torch
from torch.nn import functional as F

from idm_fast.faces.resize import resize_crops
from idm_fast.faces.sharpness import flat_level

_CLEAN_LEVEL = 1.75 / 255.0  # rms per root octave: below, the band is texture
_NOISY_LEVEL = 3.5 / 255.0  # above, it is noise
_CLEAN_BLOCKS = 1.5 / 255.0  # JPEG steps nobody sees
_HARSH_BLOCKS = 4.0 / 255.0
_BLOCK_SHARE = 0.5  # rms of the band per height of the step, for steps every 8 pixels
_OVERSUBTRACTION = 1.5  # local energy varies; this much more than the mean is taken as noise
_BLOCKS = 16
_KEPT_OCTAVES = 2  # top octaves of the crop that the original may keep
_TILES = 16  # regions a side in which a crop's energy is compared
_TOLERATED_LOSS = 0.9  # a restored crop with this share of the original's energy counts as no softer
_WINDOW = 9  # px over which energy is averaged
HALO = _WINDOW // 2  # px of context that ``detail_gain`` needs at each edge


def band_noise(high: torch.Tensor, octaves: float, blockiness: float) -> float:
    """Noise level (rms, 0..1) of a high band [3, h, w], cut from the face's middle; 0 when it is texture.

    ``octaves``: log2 of the face's own size over the crop's. ``blockiness``: see ``sharpness.blockiness``.
    """
    side = max(4, min(high.shape[1:]) // _BLOCKS)
    energy = F.avg_pool2d(high.square().mean(dim=0)[None, None], side, ceil_mode=True, count_include_pad=False)
    level = math.sqrt(flat_level(energy.numpy()))
    level *= _ramp(level / math.sqrt(max(octaves, 1.0)), _CLEAN_LEVEL, _NOISY_LEVEL)
    return max(level, _BLOCK_SHARE * blockiness * _ramp(blockiness, _CLEAN_BLOCKS, _HARSH_BLOCKS))


def detail_gain(high: torch.Tensor, noise: float) -> torch.Tensor:
    """Gain [h, w] in 0..1 for a high band [3, h, w] with the noise level ``noise`` (rms)."""
    if noise == 0.0:
        return torch.ones(high.shape[1:])
    energy = high.square().mean(dim=0)[None, None]
    for window, halo in (((_WINDOW, 1), (HALO, 0)), ((1, _WINDOW), (0, HALO))):  # a box is separable
        energy = F.avg_pool2d(energy, window, stride=1, padding=halo, count_include_pad=False)
    return (1.0 - _OVERSUBTRACTION * noise * noise / energy[0, 0].clamp_(min=1e-12)).clamp_(0.0, 1.0)


def keep_sharper(crop: torch.Tensor, before: torch.Tensor, blockiness: float) -> torch.Tensor:
    """``crop`` with the two top octaves of ``before`` (both [3, S, S], -1..1) where the network lost sharp detail.

    A network that was trained on damaged faces softens a sharp one a little even within its own resolution. Where the
    restored crop has less energy than the original in those octaves, and the original's is detail by the measure
    above, the original's octaves are mixed in until the energy is about the same again. A damaged original is soft
    or noisy there, so nothing of it returns.
    """
    both = torch.stack([before, crop])
    high, restored_high = both - _low_pass(both)
    size = crop.shape[-1]
    tiles = (min(_TILES, size), min(_TILES, size))
    middle = slice(size // 6, size - size // 6)
    # Energy by regions such as an eye or a cheek, not by pixels: one moved edge is no loss.
    energy, restored = (
        F.adaptive_avg_pool2d(band.square().mean(dim=0)[None, None], tiles) for band in (high, restored_high)
    )
    lost = (1.0 - restored / (_TOLERATED_LOSS * energy).clamp(min=1e-12)).clamp(0.0, 1.0).sqrt()
    if not lost.any():
        return crop
    # Judged as strictly as one octave: the network may be right that the rest is noise.
    noise = band_noise(high[:, middle, middle] * 0.5, 1.0, blockiness)
    lost = F.interpolate(lost, size=(size, size), mode="bilinear", align_corners=False)[0, 0]
    kept: torch.Tensor = crop + lost * detail_gain(high * 0.5, noise) * (high - restored_high)
    return kept


def _low_pass(images: torch.Tensor) -> torch.Tensor:
    """[N, 3, S, S] without their ``_KEPT_OCTAVES`` top octaves."""
    size = images.shape[-1]
    low = resize_crops(images, max(1, size >> _KEPT_OCTAVES), mode="bicubic", antialias=True)
    return resize_crops(low, size, mode="bicubic")


def _ramp(value: float, low: float, high: float) -> float:
    """0 up to ``low``, 1 from ``high`` on, smooth between."""
    t = min(max((value - low) / (high - low), 0.0), 1.0)
    return t * t * (3.0 - 2.0 * t)
