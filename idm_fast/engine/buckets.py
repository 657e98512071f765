"""Batch sizes that plans are made for: few enough to keep a graph of each."""

from __future__ import annotations

import torch
from torch import Tensor


def bucket(batch: int) -> int:
    """The power of two that holds it: at most twice the work, where a capture would cost hundreds of steps."""
    return 1 << (batch - 1).bit_length()


def padded(images: Tensor, size: int) -> Tensor:
    """``images`` [N, ...], the last repeated until there are ``size``: what it repeats cannot go out of range."""
    if size == len(images):
        return images
    return images[torch.arange(size, device=images.device).clamp_(max=len(images) - 1)]
