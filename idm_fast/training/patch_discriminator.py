"""A discriminator of patches: a small convolutional network from pixels to a logit a patch.

Sources: "Image-to-Image Translation with Conditional Adversarial Networks" (arXiv 1611.07004), section 3.2.2, for the
patches; spectral norm (arXiv 1802.05957) instead of batch norm, whose statistics mean little in a batch of eight.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from idm_fast.training.critic import Judge


class PatchDiscriminator(Judge):
    """4x4 convolutions: ``layers`` that halve, of ``width`` x 1, 2, 4, ... channels, and two that do not.

    With three layers a logit sees 70 x 70 pixels, with two 34 x 34.
    """

    def __init__(self, channels: int = 3, width: int = 64, layers: int = 2) -> None:
        super().__init__()
        modules: list[nn.Module] = []
        for layer in range(layers + 1):
            outputs = width * 2 ** min(layer, 3)
            modules += [_conv(channels, outputs, 2 if layer < layers else 1), nn.LeakyReLU(0.2)]
            channels = outputs
        self.body = nn.Sequential(*modules, _conv(channels, 1, 1))

    def forward(self, pictures: Sequence[Tensor]) -> list[Tensor]:
        """Logits [N, 1, h, w] of each of ``pictures`` [N, 3, H, W] in [-1, 1]."""
        return [self.body(picture.float()) for picture in pictures]


def _conv(inputs: int, outputs: int, stride: int) -> nn.Module:
    return spectral_norm(nn.Conv2d(inputs, outputs, 4, stride, 1))
