"""The parts of U-Nets and autoencoders: residual blocks, attention, resampling, time embedding.

With gradients off, norms and attention run through ``idm_fast.ops`` and so through the fastest back end of the
machine; with gradients on they are plain torch.
"""

from __future__ import annotations

import math
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from idm_fast import ops
from idm_fast.config import EmbeddingOrder, QkvOrder, UNetConfig
from idm_fast.errors import IdmFastError
from idm_fast.models.group_norm_grad import group_norm


class NormSettings(Protocol):
    @property
    def norm_groups(self) -> int: ...

    @property
    def norm_eps(self) -> float: ...

    @property
    def dropout(self) -> float: ...


class AttentionSettings(NormSettings, Protocol):
    @property
    def num_heads(self) -> int: ...

    @property
    def num_head_channels(self) -> int: ...

    @property
    def qkv_order(self) -> QkvOrder: ...

    @property
    def qkv_bias(self) -> bool: ...


def sinusoid(t: Tensor, channels: int, order: EmbeddingOrder, freq_shift: float = 0.0) -> Tensor:
    """[N, channels]: cos and sin of t x 10000^(-i / (channels / 2 - freq_shift)), in the family's order (DDPM)."""
    half = channels // 2
    step = -math.log(10000.0) / (half - freq_shift)
    frequencies = torch.exp(torch.arange(half, dtype=torch.float32, device=t.device) * step)
    angles = t.float()[:, None] * frequencies
    halves = [angles.cos(), angles.sin()] if order == "cos_sin" else [angles.sin(), angles.cos()]
    return torch.cat(halves, dim=1)


class TimeEmbedding(nn.Module):
    """t [N] -> [N, width] float32: sinusoid, then linear, SiLU, linear (hidden width 4 x channels).

    In float32 whatever the weights' dtype, as every family has it: a noise level near 1 differs from its neighbours
    in digits that half precision has not got.
    """

    def __init__(self, channels: int, width: int, order: EmbeddingOrder, freq_shift: float = 0.0) -> None:
        super().__init__()
        self.channels, self.order, self.freq_shift = channels, order, freq_shift
        self.fc1 = nn.Linear(channels, 4 * channels)
        self.fc2 = nn.Linear(4 * channels, width)

    def forward(self, t: Tensor) -> Tensor:
        hidden = _linear32(sinusoid(t, self.channels, self.order, self.freq_shift), self.fc1)
        return _linear32(F.silu(hidden), self.fc2)


def _linear32(x: Tensor, layer: nn.Linear) -> Tensor:
    return F.linear(x, layer.weight.float(), layer.bias.float())


class NormSiLU(nn.Module):
    """silu(gn(x) * (1 + scale) + shift); ``scale`` and ``shift`` [N, C] are optional, SiLU too (``silu=False``)."""

    def __init__(self, channels: int, groups: int, eps: float, silu: bool = True) -> None:
        super().__init__()
        if channels % groups:
            raise IdmFastError(f"GroupNorm: channels must be a multiple of norm_groups = {groups}, got {channels}")
        self.groups, self.eps, self.silu = groups, eps, silu
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor, scale: Tensor | None = None, shift: Tensor | None = None) -> Tensor:
        if not torch.is_grad_enabled():
            # A plane of 1 x 1 says nothing about its layout, so what torch makes of it may come in NCHW.
            x = x.contiguous(memory_format=torch.channels_last)
            return ops.group_norm_silu(
                x, self.groups, self.weight, self.bias, eps=self.eps, scale=scale, shift=shift, silu=self.silu
            )
        y = group_norm(x, self.groups, self.weight, self.bias, self.eps)
        if scale is not None and shift is not None:
            y = y * (1 + scale[:, :, None, None]) + shift[:, :, None, None]
        return F.silu(y) if self.silu else y


class Downsample(nn.Module):
    """3x3 convolution of stride 2; ``padding`` 0: of an image with zeros below and to the right only (DDPM)."""

    def __init__(self, channels: int, padding: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=padding)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv(x if self.conv.padding[0] else F.pad(x, (0, 1, 0, 1)))
        return out


class Upsample(nn.Module):
    """Nearest-neighbour 2x, then a 3x3 convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        return out


class ResBlock(nn.Module):
    """(x + conv(norm_silu(conv(norm_silu(x)), time))) / scale; ``resize`` 'up' / 'down': resamples inside (ADM).

    The embedding [N, width] enters as a shift before the second norm (DDPM, SR3) or as scale and shift after it
    (ADM, ``use_scale_shift_norm``).
    """

    def __init__(
        self, in_channels: int, out_channels: int, config: UNetConfig, resize: str | None = None, scale: float = 1.0
    ) -> None:
        super().__init__()
        self.resize, self.scale = resize, scale
        self.scale_shift = config.use_scale_shift_norm
        self.norm1 = NormSiLU(in_channels, config.norm_groups, config.norm_eps)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.embed = nn.Linear(config.embed_width, out_channels * (2 if self.scale_shift else 1))
        self.norm2 = NormSiLU(out_channels, config.norm_groups, config.norm_eps)
        self.dropout = nn.Dropout(config.dropout)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        nn.init.zeros_(self.conv2.weight)
        nn.init.zeros_(self.conv2.bias)  # type: ignore[arg-type]
        self.skip = nn.Identity() if in_channels == out_channels else nn.Conv2d(in_channels, out_channels, 1)

    def _resized(self, x: Tensor) -> Tensor:
        if self.resize == "up":
            return F.interpolate(x, scale_factor=2.0, mode="nearest")
        return F.avg_pool2d(x, 2) if self.resize == "down" else x

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        h = self.conv1(self._resized(self.norm1(x)))
        projected = self.embed(embedding)
        if self.scale_shift:
            scale, shift = projected.chunk(2, dim=1)
            h = self.norm2(h, scale, shift)
        else:
            h = self.norm2(h + projected[:, :, None, None])
        h = self.conv2(self.dropout(h))
        out: Tensor = self.skip(self._resized(x)) + h
        return out if self.scale == 1 else out / self.scale


class PlainBlock(nn.Module):
    """x + conv(norm_silu(conv(norm_silu(x)))): a residual block that knows of no time (VQGAN)."""

    def __init__(self, in_channels: int, out_channels: int, config: NormSettings) -> None:
        super().__init__()
        self.norm1 = NormSiLU(in_channels, config.norm_groups, config.norm_eps)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = NormSiLU(out_channels, config.norm_groups, config.norm_eps)
        self.dropout = nn.Dropout(config.dropout)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.skip = nn.Identity() if in_channels == out_channels else nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv2(self.dropout(self.norm2(self.conv1(self.norm1(x)))))
        out: Tensor = self.skip(x) + h
        return out


class Attention(nn.Module):
    """(x + out(softmax(q k^T / sqrt(d)) v)) / scale over the H x W positions of x [N, C, H, W].

    ``qkv_order``: the channels of the joint projection are (q, k, v) with heads inside ("qkv_heads") or heads with
    (q, k, v) inside ("heads_qkv", guided-diffusion's legacy order). Both have the same shapes. ``normed``: a group norm
    stands before the projection.
    """

    def __init__(self, channels: int, config: AttentionSettings, *, normed: bool = True, scale: float = 1.0) -> None:
        super().__init__()
        self.scale = scale
        width = config.num_head_channels
        if width and channels % width:
            raise IdmFastError(f"Attention: channels must be a multiple of num_head_channels = {width}, got {channels}")
        self.heads = channels // width if width else config.num_heads
        if channels % self.heads:
            raise IdmFastError(f"Attention: channels must be a multiple of num_heads = {self.heads}, got {channels}")
        self.order = config.qkv_order
        self.norm = NormSiLU(channels, config.norm_groups, config.norm_eps, silu=False) if normed else None
        self.qkv = nn.Conv2d(channels, 3 * channels, 1, bias=config.qkv_bias)
        self.out = nn.Conv2d(channels, channels, 1)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        n, c, height, width = x.shape
        qkv = self.qkv(x if self.norm is None else self.norm(x)).permute(0, 2, 3, 1).reshape(n, height * width, 3 * c)
        if self.order == "qkv_heads":
            q, k, v = qkv.view(n, -1, 3, self.heads, c // self.heads).unbind(2)
        else:
            q, k, v = qkv.view(n, -1, self.heads, 3, c // self.heads).unbind(3)
        if torch.is_grad_enabled():
            h = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)).transpose(1, 2)
        else:
            h = ops.attention(q, k, v)
        h = h.reshape(n, height, width, c).permute(0, 3, 1, 2)
        out: Tensor = x + self.out(h)
        return out if self.scale == 1 else out / self.scale
