"""Resizing of square crops as two small matrix products, several times faster on a CPU than the filter itself."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F


def resize_crops(
    images: torch.Tensor,  # [..., S, S]
    size: int,
    *,
    mode: str,
    antialias: bool = False,
) -> torch.Tensor:
    """``F.interpolate(images, (size, size), mode=mode, antialias=antialias, align_corners=False)``, up to rounding.

    Of float32 on the CPU. Every filter of ``interpolate`` is linear and separable: it is applied once to the unit
    matrix, and then to all crops of that size.
    """
    matrix = torch.from_numpy(_matrix(images.shape[-1], size, mode, antialias))
    with torch.autocast("cpu", enabled=False):  # unlike a filter's, a product's numbers would be rounded by it
        return matrix @ (images @ matrix.T) if size < images.shape[-1] else (matrix @ images) @ matrix.T


@lru_cache(maxsize=32)
def _matrix(before: int, after: int, mode: str, antialias: bool) -> np.ndarray[Any, np.dtype[np.float32]]:
    """[after, before]; an array, since a tensor made in inference mode could not serve a training step."""
    unit = torch.eye(before, dtype=torch.float32, device="cpu")[None, None]
    resized = F.interpolate(unit, size=(after, before), mode=mode, antialias=antialias, align_corners=False)
    return resized[0, 0].numpy()
