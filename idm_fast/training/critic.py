"""A critic that tells restored faces from real ones by their VGG16 features.

The frozen features do the seeing, so that a few small convolutions suffice and learn in tens of steps, where a network
that begins from pixels needs thousands. Hinge loss; spectral norm bounds what the critic can ask of the restorer.
Source: "Projected GANs Converge Faster", NeurIPS 2021 (arXiv 2111.01007), without its random mixing of channels.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

# (channels, root mean square on sharp faces) of relu2_2, 3_3, 4_3 and 5_3: every head sees values near 1.
_MAPS = ((128, 2.8), (256, 5.6), (512, 4.0), (512, 0.94))
_WIDTH = 64


def _head(channels: int) -> nn.Sequential:
    return nn.Sequential(
        spectral_norm(nn.Conv2d(channels, _WIDTH, 1)),
        nn.LeakyReLU(0.2),
        spectral_norm(nn.Conv2d(_WIDTH, _WIDTH, 3, padding=1)),
        nn.LeakyReLU(0.2),
        spectral_norm(nn.Conv2d(_WIDTH, 1, 1)),
    )


class Judge(nn.Module, ABC):
    """Tells made pictures from real ones by the hinge loss; a logit a position, above 0 for "real"."""

    @abstractmethod
    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Logits [N, 1, h, w] of what it looks at: feature maps, or the pictures themselves."""

    def persuade(self, fake: Sequence[Tensor]) -> Tensor:
        """What the restorer minimises: minus the mean logit of its faces; no gradient reaches the critic."""
        self.requires_grad_(False)
        loss = -torch.stack([logits.mean() for logits in self(fake)]).mean()
        self.requires_grad_(True)
        return loss

    def hinge(self, real: Sequence[Tensor], fake: Sequence[Tensor]) -> Tensor:
        """What the critic minimises; 2 is a guess, 0 is certainty. No gradient reaches the features."""
        count = len(real[0])
        both = self([torch.cat([a.detach(), b.detach()]) for a, b in zip(real, fake, strict=True)])
        return torch.stack([F.relu(1 - x[:count]).mean() + F.relu(1 + x[count:]).mean() for x in both]).mean()


class Critic(Judge):
    """One head a feature map."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = nn.ModuleList([_head(channels) for channels, _ in _MAPS])

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Logits [N, 1, H_l, W_l] of the four coarser of VGG16's five ``maps``."""
        return [
            head(features.float() / size) for head, features, (_, size) in zip(self.heads, maps[1:], _MAPS, strict=True)
        ]
