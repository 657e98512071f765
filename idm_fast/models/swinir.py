"""SwinIR (2108.10257) as DifFace uses it: a regression network from a degraded face to an estimate of the clean one.

The picture is unshuffled to a small grid, residual groups of window attention work there, and nearest-neighbour
doublings with convolutions bring it back. Inference only; in plain torch, since it runs once where the chain behind it
runs a network a hundred times. Submodules have the names of the public files.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from idm_fast.errors import IdmFastError

_MEAN = (0.4488, 0.4371, 0.4040)  # of DIV2K's colours; a constant of the code that no file holds
_SHUT = -100.0  # added to the logits of positions that were never neighbours, as the networks were trained


@dataclass(frozen=True)
class SwinIRConfig:
    """Shape of one network; the defaults are DifFace's estimator for 512 px (15.8 M parameters).

    ``scale``: factor of the pixel-unshuffle stem and of the doublings at the end (2, 4 or 8), so that output and input
    are of one size. ``depths``: blocks of each residual group; ``heads``: of each group's attentions. ``window``: side
    of an attention window on the small grid. ``hidden``, ``features``: channels inside a block's two linear layers, and
    of the doublings.
    """

    embed_dim: int = 180
    depths: tuple[int, ...] = (6,) * 8
    heads: tuple[int, ...] = (6,) * 8
    window: int = 8
    hidden: int = 360
    scale: int = 8
    features: int = 64

    def __post_init__(self) -> None:
        if self.scale not in (2, 4, 8):
            raise IdmFastError(f"SwinIR: scale must be 2, 4 or 8, got {self.scale}")
        if not self.depths or len(self.depths) != len(self.heads) or min(self.depths) < 1:
            raise IdmFastError(f"SwinIR: depths and heads must be one list each, got {self.depths} and {self.heads}")
        if any(heads < 1 or self.embed_dim % heads for heads in self.heads):
            raise IdmFastError(f"SwinIR: heads must divide embed_dim = {self.embed_dim}, got {self.heads}")
        if self.window < 2:
            raise IdmFastError(f"SwinIR: window must be >= 2, got {self.window}")

    @property
    def size_multiple(self) -> int:
        """Height and width of an input must be multiples of this."""
        return self.scale * self.window

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


class SwinIR(nn.Module):
    """An estimate of the clean picture: ``x`` [N, 3, H, W] in [0, 1] -> the same shape, about [0, 1], not clamped.

    H and W must be multiples of ``config.size_multiple`` (64); raises ``IdmFastError`` else.
    """

    def __init__(self, config: SwinIRConfig) -> None:
        super().__init__()
        self.config = config
        c, dim, wide = config, config.embed_dim, config.features
        self.conv_first = nn.Sequential(nn.PixelUnshuffle(c.scale), _conv(3 * c.scale**2, dim))
        self.patch_embed = nn.ModuleDict({"norm": nn.LayerNorm(dim)})
        self.layers = nn.ModuleList(
            [
                ResidualGroup(dim, depth, heads, c.window, c.hidden)
                for depth, heads in zip(c.depths, c.heads, strict=True)
            ]
        )
        self.norm = nn.LayerNorm(dim)
        self.conv_after_body = _conv(dim, dim)
        self.conv_before_upsample = nn.Sequential(_conv(dim, wide), nn.LeakyReLU(0.01))
        self.conv_up1 = _conv(wide, wide)
        self.conv_up2 = _conv(wide, wide) if c.scale >= 4 else None
        self.conv_up3 = _conv(wide, wide) if c.scale == 8 else None
        self.conv_hr = _conv(wide, wide)
        self.conv_last = _conv(wide, 3)

    def forward(self, x: Tensor) -> Tensor:
        multiple, shape = self.config.size_multiple, tuple(x.shape)
        if x.ndim != 4 or shape[1] != 3 or 0 in shape or shape[2] % multiple or shape[3] % multiple:
            raise IdmFastError(f"SwinIR: x must be [N, 3, H, W] with H and W multiples of {multiple}, got {shape}")
        mean = torch.tensor(_MEAN, dtype=x.dtype, device=x.device)[:, None, None]
        first: Tensor = self.conv_first(x - mean)
        deep = self.patch_embed["norm"](first.permute(0, 2, 3, 1))  # [N, h, w, C] from here on
        for layer in self.layers:
            deep = layer(deep)
        deep = self.norm(deep).permute(0, 3, 1, 2)
        h: Tensor = self.conv_before_upsample(self.conv_after_body(deep) + first)
        for conv in (self.conv_up1, self.conv_up2, self.conv_up3):
            if conv is not None:
                h = _leaky(conv(F.interpolate(h, scale_factor=2.0, mode="nearest")))
        return torch.as_tensor(self.conv_last(_leaky(self.conv_hr(h)))) + mean


class ResidualGroup(nn.Module):
    """x + conv(blocks(x)) of x [N, h, w, C]; every second block's windows are shifted by half."""

    def __init__(self, dim: int, depth: int, heads: int, window: int, hidden: int) -> None:
        super().__init__()
        blocks = [Block(dim, heads, window, hidden, window // 2 if i % 2 else 0) for i in range(depth)]
        self.residual_group = nn.ModuleDict({"blocks": nn.Sequential(*blocks)})
        self.conv = _conv(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        h = self.residual_group["blocks"](x)
        out: Tensor = x + self.conv(h.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return out


class Block(nn.Module):
    """A transformer block on windows of x [N, h, w, C]."""

    def __init__(self, dim: int, heads: int, window: int, hidden: int, shift: int) -> None:
        super().__init__()
        self.window, self.shift = window, shift
        self.norm1 = nn.LayerNorm(dim)
        self.attn = WindowAttention(dim, heads, window)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(dim, hidden), "fc2": nn.Linear(hidden, dim)})

    def forward(self, x: Tensor) -> Tensor:
        n, height, width, c = x.shape
        side, shift = self.window, self.shift
        h = self.norm1(x)
        if shift:
            h = torch.roll(h, (-shift, -shift), dims=(1, 2))
        windows = h.view(n, height // side, side, width // side, side, c).transpose(2, 3).reshape(n, -1, side * side, c)
        shut = _shut_out(height, width, side, shift, x) if shift else None
        h = self.attn(windows, shut).view(n, height // side, width // side, side, side, c)
        h = h.transpose(2, 3).reshape(n, height, width, c)
        if shift:
            h = torch.roll(h, (shift, shift), dims=(1, 2))
        x = x + h
        out: Tensor = x + self.mlp["fc2"](F.gelu(self.mlp["fc1"](self.norm2(x))))
        return out


class WindowAttention(nn.Module):
    """Attention inside each window, with a learned bias for each offset between two positions.

    x [N, windows, side^2, C]; ``shut`` [windows, side^2, side^2] is added to the logits.
    """

    def __init__(self, dim: int, heads: int, side: int) -> None:
        super().__init__()
        self.heads = heads
        self.relative_position_bias_table = nn.Parameter(torch.zeros((2 * side - 1) ** 2, heads))
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.side = side

    def forward(self, x: Tensor, shut: Tensor | None) -> Tensor:
        n, windows, positions, c = x.shape
        qkv = self.qkv(x).view(n, windows, positions, 3, self.heads, c // self.heads)
        q, k, v = qkv.permute(3, 0, 1, 4, 2, 5).unbind(0)  # [N, windows, heads, positions, width]
        bias = self.relative_position_bias_table[_offsets(self.side, x.device)].permute(2, 0, 1)
        mask = bias if shut is None else bias + shut[:, None]
        h = F.scaled_dot_product_attention(q, k, v, attn_mask=mask.to(q.dtype))
        out: Tensor = self.proj(h.transpose(2, 3).reshape(n, windows, positions, c))
        return out


@lru_cache(maxsize=8)
def _offsets(side: int, device: torch.device) -> Tensor:
    """[side^2, side^2]: row of the bias table for each pair of positions. Files hold it; it need not be believed."""
    row, column = torch.meshgrid(*2 * [torch.arange(side, device=device)], indexing="ij")
    down = row.flatten()[:, None] - row.flatten() + side - 1
    right = column.flatten()[:, None] - column.flatten() + side - 1
    return down * (2 * side - 1) + right


def _shut_out(height: int, width: int, side: int, shift: int, like: Tensor) -> Tensor:
    """[windows, side^2, side^2]: 0, or ``_SHUT`` between positions that only rolling has brought into one window."""

    def parts(length: int) -> Tensor:
        at = torch.arange(length, device=like.device)
        return (at >= length - side).long() + (at >= length - shift).long()

    part = 3 * parts(height)[:, None] + parts(width)
    part = part.view(height // side, side, width // side, side).transpose(1, 2).reshape(-1, side * side)
    apart = part[:, :, None] != part[:, None, :]
    return torch.where(apart, _SHUT, 0.0).to(like.dtype)


def _conv(channels: int, out: int) -> nn.Conv2d:
    return nn.Conv2d(channels, out, 3, padding=1)


def _leaky(x: Tensor) -> Tensor:
    return F.leaky_relu(x, 0.2)
