"""The best linear stand-in for a VQGAN's decoder: a 3 x 3 convolution of the latent, found by least squares."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from idm_fast.models.vqgan import Vqgan

_KERNEL = 3


class LightDecoder(nn.Module):
    """[N, D, h, w] -> [N, channels, factor h, factor w]: every position's neighbourhood to its block of pixels."""

    def __init__(self, latent_channels: int, channels: int, factor: int) -> None:
        super().__init__()
        self.factor = factor
        self.conv = nn.Conv2d(latent_channels, channels * factor**2, _KERNEL, padding=_KERNEL // 2)

    def forward(self, latent: Tensor) -> Tensor:
        """The picture in about [-1, 1] of a latent in the autoencoder's own unit."""
        return F.pixel_shuffle(self.conv(latent), self.factor)

    @classmethod
    @torch.no_grad()
    def fit(cls, vqgan: Vqgan, faces: Tensor, batch: int = 16) -> LightDecoder:
        """Of the latents of ``faces`` [N, 3, S, S] in [-1, 1], and what ``vqgan`` decodes of them unquantised."""
        config, device = vqgan.config, next(vqgan.parameters()).device
        light = cls(config.embed_channels, config.out_channels, config.factor).to(device)
        columns = config.embed_channels * _KERNEL**2 + 1  # and a constant
        normal = torch.zeros(columns, columns, dtype=torch.float64, device=device)
        right = torch.zeros(columns, light.conv.out_channels, dtype=torch.float64, device=device)
        for x in torch.split(faces, batch):
            z = vqgan.encode(x.to(device))
            blocks = F.pixel_unshuffle(vqgan.decode(z, quantize=False), config.factor).flatten(2).double()
            seen = F.unfold(z, _KERNEL, padding=_KERNEL // 2).double()
            seen = torch.cat([seen, torch.ones_like(seen[:, :1])], dim=1)
            normal += torch.einsum("nap,nbp->ab", seen, seen)
            right += torch.einsum("nap,nbp->ab", seen, blocks)
        # A latent's channels may depend on each other: a little of the diagonal more keeps the equations solvable.
        normal += 1e-6 * normal.diagonal().mean() * torch.eye(columns, dtype=torch.float64, device=device)
        found = torch.linalg.solve(normal, right)
        light.conv.weight.copy_(found[:-1].T.reshape(light.conv.weight.shape))
        assert light.conv.bias is not None
        light.conv.bias.copy_(found[-1])
        return light.requires_grad_(False).eval()
