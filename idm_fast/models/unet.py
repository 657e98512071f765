"""The U-Net of every pixel-space model here: SR3, guided-diffusion, DifFace and our own, by configuration.

All of them share one skeleton: a stem, residual blocks per level going down (each output kept for the skip),
a middle, the same going up with concatenated skips, and a normalised last convolution. What differs is a field of
``UNetConfig``.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from idm_fast.config import UNetConfig
from idm_fast.errors import IdmFastError
from idm_fast.models.blocks import Attention, Downsample, NormSiLU, ResBlock, TimeEmbedding, Upsample


class Level(nn.Module):
    """One step of the way: a residual block, attention or not, or a change of resolution."""

    def __init__(self, block: nn.Module, attention: Attention | None = None) -> None:
        super().__init__()
        self.block = block
        self.attention = attention

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        x = self.block(x, embedding) if isinstance(self.block, ResBlock) else self.block(x)
        return x if self.attention is None else self.attention(x)


class UNet(nn.Module):
    """Network output of ``(x_t, t[, cond][, labels])`` (eps, v or x0: the schedule's owner knows).

    Shapes: ``x`` [N, in_channels, H, W] with H and W multiples of ``config.size_multiple``; ``t`` [N] or [N, 1] in the
    network's own time (index, 1000 t or noise level); ``cond`` [N, cond_channels, H, W], of another size where
    ``config.cond_resize`` says how it is resized; ``labels`` int64 [N]; output [N, out_channels, H, W]. A residual
    network adds ``cond`` in the dtype it came in: a float32 one is not rounded to the weights' dtype. Raises
    ``IdmFastError`` for other shapes.
    Sources: SR3 (2104.07636), ADM (2105.05233).
    """

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        self.config = config
        c, width = config, config.embed_width
        area = c.unshuffle**2
        self.time = TimeEmbedding(c.time_width, width, c.embedding_order, c.freq_shift)
        self.label = nn.Embedding(c.num_classes, width) if c.num_classes else None
        channels = c.stem_width
        self.stem = nn.Conv2d((c.in_channels + c.cond_channels) * area, channels, 3, padding=1)

        skips = [channels]
        self.down = nn.ModuleList()
        last = len(c.channel_mult) - 1
        inside = c.resample == "resblock"
        for level, mult in enumerate(c.channel_mult):
            for _ in range(c.num_res_blocks[level]):
                out = c.model_channels * mult
                self.down.append(self._level(channels, out, level))
                channels = out
                skips.append(channels)
            if level != last:
                down = (
                    ResBlock(channels, channels, c, resize="down")
                    if inside
                    else Downsample(channels, c.downsample_padding)
                )
                self.down.append(Level(down))
                skips.append(channels)

        attention = None
        if c.middle_attention != "none":
            attention = Attention(channels, c, normed=c.middle_attention == "norm", scale=c.middle_scale)
        first, second = (ResBlock(channels, channels, c, scale=c.middle_scale) for _ in range(2))
        self.middle = nn.ModuleList([Level(first, attention), Level(second)])

        self.up = nn.ModuleList()
        for level, mult in reversed(list(enumerate(c.channel_mult))):
            for _ in range(c.num_res_blocks[level] + 1):
                out = c.model_channels * mult
                self.up.append(self._level(channels + skips.pop(), out, level))
                channels = out
            if level:
                up = ResBlock(channels, channels, c, resize="up") if inside else Upsample(channels)
                self.up.append(Level(up))

        self.out_norm = NormSiLU(channels, c.norm_groups, c.norm_eps)
        self.out_conv = nn.Conv2d(channels, c.out_channels * area, 3, padding=1)
        nn.init.zeros_(self.out_conv.weight)
        nn.init.zeros_(self.out_conv.bias)  # type: ignore[arg-type]

    def _level(self, in_channels: int, out_channels: int, level: int) -> Level:
        attention = Attention(out_channels, self.config) if level in self.config.attention_levels else None
        return Level(ResBlock(in_channels, out_channels, self.config), attention)

    def forward(self, x: Tensor, t: Tensor, cond: Tensor | None = None, labels: Tensor | None = None) -> Tensor:
        c = self.config
        if t.ndim == 2 and t.shape[1] == 1:
            t = t[:, 0]
        if cond is not None and c.cond_resize == "bilinear" and cond.ndim == 4 and cond.shape[2:] != x.shape[2:]:
            cond = nn.functional.interpolate(cond, x.shape[2:], mode="bilinear")
        self._check(x, t, cond, labels)
        embedding = self.time(t)
        if self.label is not None and labels is not None:
            embedding = embedding + self.label(labels)
        if c.embed_silu:
            embedding = nn.functional.silu(embedding)
        embedding = embedding.to(self.stem.weight.dtype)
        h = 2 * x - 1 if c.center_input else x
        if cond is not None:
            hint = cond.to(x.dtype)
            h = torch.cat([h, hint] if c.concat_order == "x_cond" else [hint, h], dim=1)
        if c.unshuffle > 1:
            h = nn.functional.pixel_unshuffle(h, c.unshuffle)
        h = self.stem(h.contiguous(memory_format=torch.channels_last))
        skips = [h]
        for level in self.down:
            h = level(h, embedding)
            skips.append(h)
        for level in self.middle:
            h = level(h, embedding)
        for level in self.up:
            if isinstance(level.block, ResBlock) and level.block.resize is None:
                h = torch.cat([h, skips.pop()], dim=1)
            h = level(h, embedding)
        h = self.out_conv(self.out_norm(h))
        if c.unshuffle > 1:
            h = nn.functional.pixel_shuffle(h, c.unshuffle)
        return h + cond if c.residual and cond is not None else h

    def _check(self, x: Tensor, t: Tensor, cond: Tensor | None, labels: Tensor | None) -> None:
        c, multiple = self.config, self.config.size_multiple
        shape = tuple(x.shape)
        if x.ndim != 4 or shape[1] != c.in_channels or 0 in shape or shape[2] % multiple or shape[3] % multiple:
            raise IdmFastError(
                f"UNet: x must be [N, {c.in_channels}, H, W] with H and W multiples of {multiple}, got {shape}"
            )
        if t.shape != x.shape[:1]:
            raise IdmFastError(f"UNet: t must be [N] = ({shape[0]},), got {tuple(t.shape)}")
        expected = (shape[0], c.cond_channels, *shape[2:]) if c.cond_channels else None
        got = None if cond is None else tuple(cond.shape)
        if got != expected:
            raise IdmFastError(f"UNet: cond must be {expected}, got {got}")
        if (labels is None) != (self.label is None):
            raise IdmFastError(f"UNet: labels must be given exactly when num_classes = {c.num_classes} is above 0")
        if labels is not None and labels.shape != t.shape:
            raise IdmFastError(f"UNet: labels must be [N] = ({shape[0]},), got {tuple(labels.shape)}")
