"""The same network as plain torch modules: what others compile, export and run.

Norm and attention of ``UNet`` go through our own operations, which no compiler looks into; here they are torch's fused
operators (``F.group_norm``, ``scaled_dot_product_attention``), as one would write the network without this package.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from idm_fast.models.blocks import Attention, NormSiLU
from idm_fast.models.unet import UNet

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]  # q, k, v [N, positions, heads, width] -> the same shape


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)).transpose(1, 2)


def xformers_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    from xformers.ops import memory_efficient_attention

    out: Tensor = memory_efficient_attention(q.contiguous(), k.contiguous(), v.contiguous())
    return out


class PlainNorm(nn.Module):
    def __init__(self, norm: NormSiLU) -> None:
        super().__init__()
        self.groups, self.eps, self.silu = norm.groups, norm.eps, norm.silu
        self.weight, self.bias = norm.weight, norm.bias

    def forward(self, x: Tensor, scale: Tensor | None = None, shift: Tensor | None = None) -> Tensor:
        y = F.group_norm(x, self.groups, self.weight, self.bias, self.eps)
        if scale is not None and shift is not None:
            y = y * (1 + scale[:, :, None, None]) + shift[:, :, None, None]
        return F.silu(y) if self.silu else y


class PlainAttention(nn.Module):
    def __init__(self, attention: Attention, attend: Attend) -> None:
        super().__init__()
        self.heads, self.order, self.attend = attention.heads, attention.order, attend
        self.norm = nn.Identity() if attention.norm is None else PlainNorm(attention.norm)
        self.scale = attention.scale
        self.qkv, self.out = attention.qkv, attention.out

    def forward(self, x: Tensor) -> Tensor:
        n, c, height, width = x.shape
        qkv = self.qkv(self.norm(x)).permute(0, 2, 3, 1).reshape(n, height * width, 3 * c)
        if self.order == "qkv_heads":
            q, k, v = qkv.view(n, -1, 3, self.heads, c // self.heads).unbind(2)
        else:
            q, k, v = qkv.view(n, -1, self.heads, 3, c // self.heads).unbind(3)
        h = self.attend(q, k, v).reshape(n, height, width, c).permute(0, 3, 1, 2)
        out: Tensor = x + self.out(h)
        return out if self.scale == 1 else out / self.scale


class Network(nn.Module):
    """``forward(x, t[, cond])`` with the time as float32 [N]: one positional signature for every exporter."""

    def __init__(self, model: UNet) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor, t: Tensor, cond: Tensor | None = None) -> Tensor:
        out: Tensor = self.model(x, t, cond)
        return out


def plain(model: UNet, attend: Attend = sdpa) -> Network:
    """A copy of ``model`` without our operations, same weights, dtype, device and layout."""
    made = copy.deepcopy(model)
    for module in list(made.modules()):
        for name, child in module.named_children():
            if isinstance(child, Attention):
                setattr(module, name, PlainAttention(child, attend))
            elif isinstance(child, NormSiLU):
                setattr(module, name, PlainNorm(child))
    return Network(made).eval().requires_grad_(False)


def example(model: UNet, batch: int, height: int, width: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Inputs of the network for tracing: (x, t[, cond]), zeros on the CPU."""
    c = model.config
    x = torch.zeros(batch, c.in_channels, height, width, dtype=dtype).contiguous(memory_format=torch.channels_last)
    t = torch.ones(batch)
    return (x, t, torch.zeros(batch, c.cond_channels, height, width)) if c.cond_channels else (x, t)
