"""The vector-quantised autoencoder: a picture as a small image of codes, and back.

The layout is that of taming-transformers (VQGAN) and latent diffusion, whose f4 is a preset. ``encode`` does not
quantise and ``decode`` does, so that what works on latents may leave the codes. Sources: "Taming Transformers for
High-Resolution Image Synthesis" (arXiv 2012.09841), "High-Resolution Image Synthesis with Latent Diffusion Models"
(arXiv 2112.10752).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from idm_fast import ops
from idm_fast.config_vqgan import VqganConfig
from idm_fast.errors import IdmFastError
from idm_fast.models.blocks import Attention, Downsample, NormSiLU, PlainBlock, Upsample


class Encoder(nn.Module):
    """[N, in_channels, H, W] -> [N, z_channels, H / factor, W / factor]."""

    def __init__(self, config: VqganConfig) -> None:
        super().__init__()
        self.unshuffle = config.unshuffle
        channels = config.stem_width
        self.stem = nn.Conv2d(config.in_channels * config.unshuffle**2, channels, 3, padding=1)
        down: list[nn.Module] = []
        for level, mult in enumerate(config.channel_mult):
            width = config.model_channels * mult
            for _ in range(config.num_res_blocks[level]):
                down += _stage(channels, width, level, config)
                channels = width
            if level + 1 < len(config.channel_mult):
                down.append(Downsample(channels, padding=0))
        self.down = nn.Sequential(*down)
        self.middle = _middle(channels, config)
        self.out_norm = NormSiLU(channels, config.norm_groups, config.norm_eps)
        self.out_conv = nn.Conv2d(channels, config.z_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        h = nn.functional.pixel_unshuffle(x, self.unshuffle) if self.unshuffle > 1 else x
        h = self.stem(h.contiguous(memory_format=torch.channels_last))
        out: Tensor = self.out_conv(self.out_norm(self.middle(self.down(h))))
        return out


class Decoder(nn.Module):
    """[N, z_channels, H / factor, W / factor] -> [N, out_channels, H, W]."""

    def __init__(self, config: VqganConfig) -> None:
        super().__init__()
        self.unshuffle = config.unshuffle
        channels = config.model_channels * config.channel_mult[-1]
        self.stem = nn.Conv2d(config.z_channels, channels, 3, padding=1)
        self.middle = _middle(channels, config)
        up: list[nn.Module] = []
        for level, mult in reversed(list(enumerate(config.channel_mult))):
            width = config.model_channels * mult
            for _ in range(config.num_res_blocks[level] + 1):
                up += _stage(channels, width, level, config)
                channels = width
            if level:
                up.append(Upsample(channels))
        self.up = nn.Sequential(*up)
        self.out_norm = NormSiLU(channels, config.norm_groups, config.norm_eps)
        self.out_conv = nn.Conv2d(channels, config.out_channels * config.unshuffle**2, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        h = self.stem(z.contiguous(memory_format=torch.channels_last))
        h = self.out_conv(self.out_norm(self.up(self.middle(h))))
        return nn.functional.pixel_shuffle(h, self.unshuffle) if self.unshuffle > 1 else h


class Codebook(nn.Module):
    """The codes, ``weight`` [codebook_size, embed_channels]."""

    def __init__(self, size: int, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size, channels).uniform_(-1 / size, 1 / size))

    def forward(self, latent: Tensor) -> tuple[Tensor, Tensor]:
        """(nearest codes [N, D, h, w] of ``latent``'s dtype, their numbers int64 [N, h, w]).

        The search is exact in float32 whatever the latent's dtype. With gradients on, that of the codes is handed to
        the latent as it is (straight-through, arXiv 1711.00937), and none reaches the codebook.
        """
        with torch.no_grad():
            z = latent.detach().float().contiguous(memory_format=torch.channels_last)
            codes, quantised = ops.vq_nearest(z, self.weight.detach().float())
            quantised = quantised.to(latent.dtype)
        if torch.is_grad_enabled() and latent.requires_grad:
            quantised = latent + (quantised - latent).detach()
        return quantised, codes


class Vqgan(nn.Module):
    """``decode(encode(x))``: pictures [N, in_channels, H, W] in [-1, 1], H and W multiples of ``config.factor``.

    ``encode`` gives the latent [N, embed_channels, H / factor, W / factor], not quantised; ``quantize`` its nearest
    codes; ``decode`` quantises first. Raises ``IdmFastError`` for other shapes.
    """

    def __init__(self, config: VqganConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.to_latent = nn.Conv2d(config.z_channels, config.embed_channels, 1)
        self.codebook = Codebook(config.codebook_size, config.embed_channels)
        self.from_latent = nn.Conv2d(config.embed_channels, config.z_channels, 1)
        self.decoder = Decoder(config)

    def encode(self, x: Tensor) -> Tensor:
        """The latent of pictures, as the network has it before it is rounded to codes."""
        c, shape = self.config, tuple(x.shape)
        if x.ndim != 4 or shape[1] != c.in_channels or 0 in shape or shape[2] % c.factor or shape[3] % c.factor:
            raise IdmFastError(
                f"Vqgan: x must be [N, {c.in_channels}, H, W] with H and W multiples of {c.factor}, got {shape}"
            )
        latent: Tensor = self.to_latent(self.encoder(x))
        return latent

    def quantize(self, latent: Tensor) -> tuple[Tensor, Tensor]:
        """(nearest codes as an image of ``latent``'s shape, their numbers int64 [N, h, w])."""
        self._check(latent)
        quantised, codes = self.codebook(latent)
        return quantised, codes

    def decode(self, latent: Tensor, *, quantize: bool = True) -> Tensor:
        """The picture of a latent; ``quantize=False``: of the latent as it is, which may hold codes already."""
        self._check(latent)
        if quantize:
            latent, _ = self.codebook(latent)
        picture: Tensor = self.decoder(self.from_latent(latent))
        return picture

    def forward(self, x: Tensor) -> Tensor:
        return self.decode(self.encode(x))

    def _check(self, latent: Tensor) -> None:
        d, shape = self.config.embed_channels, tuple(latent.shape)
        if latent.ndim != 4 or shape[1] != d or 0 in shape:
            raise IdmFastError(f"Vqgan: latent must be [N, {d}, h, w], got {shape}")


def _stage(inputs: int, width: int, level: int, config: VqganConfig) -> list[nn.Module]:
    """A residual block, and attention where the level has it."""
    block = PlainBlock(inputs, width, config)
    return [block, Attention(width, config)] if level in config.attention_levels else [block]


def _middle(channels: int, config: VqganConfig) -> nn.Sequential:
    attention = [Attention(channels, config)] if config.middle_attention else []
    return nn.Sequential(PlainBlock(channels, channels, config), *attention, PlainBlock(channels, channels, config))
