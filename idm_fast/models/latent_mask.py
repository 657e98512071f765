"""Where identity guidance may change a latent: a learnable mask [D, h, w] (CLR-Face, 2402.06106)."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class LatentMask(nn.Module):
    """sigmoid(logits), a number in [0, 1] for every channel and position of a latent [N, channels, height, width].

    It begins at one half everywhere.
    """

    def __init__(self, channels: int, height: int, width: int) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(channels, height, width))

    def forward(self) -> Tensor:
        """The mask [channels, height, width] float32; it multiplies a gradient of any number of latents."""
        return torch.sigmoid(self.logits.float())
