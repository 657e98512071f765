"""The network as the public repositories of guided-diffusion, DifFace and SR3 write it: what users run today.

NCHW memory, group norms and softmax computed in float32 whatever the dtype, SiLU a call of its own, skips copied
together, nearest neighbours written out before their convolution, attention as two products with the weights between.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from idm_fast.bench.peers import Built
from idm_fast.bench.peers.torch_peers import built
from idm_fast.bench.plain import PlainAttention, PlainNorm, plain
from idm_fast.bench.workload import DTYPES, Workload


class Norm(nn.Module):
    """The group norm of guided-diffusion, and SiLU behind it."""

    def __init__(self, norm: PlainNorm) -> None:
        super().__init__()
        self.groups, self.eps, self.silu = norm.groups, norm.eps, norm.silu
        self.weight, self.bias = nn.Parameter(norm.weight.float()), nn.Parameter(norm.bias.float())

    def forward(self, x: Tensor, scale: Tensor | None = None, shift: Tensor | None = None) -> Tensor:
        y = F.group_norm(x.float(), self.groups, self.weight, self.bias, self.eps).type(x.dtype)
        if scale is not None and shift is not None:
            y = y * (1 + scale[:, :, None, None]) + shift[:, :, None, None]
        return F.silu(y) if self.silu else y


class Attention(nn.Module):
    """Of guided-diffusion: over [N, C, positions], q and k each scaled by width^-1/4."""

    def __init__(self, attention: PlainAttention) -> None:
        super().__init__()
        self.heads, self.order = attention.heads, attention.order
        self.norm = Norm(attention.norm) if isinstance(attention.norm, PlainNorm) else attention.norm
        self.qkv, self.out = _pointwise(attention.qkv), _pointwise(attention.out)

    def forward(self, x: Tensor) -> Tensor:
        n, c, height, width = x.shape
        qkv = self.qkv(self.norm(x).reshape(n, c, -1))
        if self.order == "qkv_heads":
            q, k, v = qkv.view(n, 3, self.heads, c // self.heads, -1).unbind(1)
        else:
            q, k, v = qkv.view(n, self.heads, 3, c // self.heads, -1).unbind(2)
        scale = (c // self.heads) ** -0.25
        weight = torch.einsum("nhct,nhcs->nhts", q * scale, k * scale)
        weight = torch.softmax(weight.float(), dim=-1).type(weight.dtype)
        mixed = torch.einsum("nhts,nhcs->nhct", weight, v).reshape(n, c, -1)
        out: Tensor = x + self.out(mixed).reshape(n, c, height, width)
        return out


class Contiguous(nn.Module):
    """A convolution that everything behind it takes its NCHW memory from."""

    def __init__(self, conv: nn.Module) -> None:
        super().__init__()
        self.conv, self.weight = conv, conv.weight

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv(x.contiguous())
        return out


def public(workload: Workload, dtype: str, threads: int) -> Built:
    network = plain(workload.module(DTYPES[dtype])).to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    for module in list(network.modules()):
        for name, child in module.named_children():
            if isinstance(child, PlainAttention):
                setattr(module, name, Attention(child))
            elif isinstance(child, PlainNorm):
                setattr(module, name, Norm(child))
    network.model.stem = Contiguous(network.model.stem)
    network.requires_grad_(False)
    return built(workload, dtype, network, note="written as in the public repositories")


def _pointwise(conv: nn.Module) -> nn.Conv1d:
    """A 1x1 convolution over a list of positions."""
    assert isinstance(conv, nn.Conv2d)
    made = nn.Conv1d(conv.in_channels, conv.out_channels, 1, bias=conv.bias is not None)
    made.weight, made.bias = nn.Parameter(conv.weight[..., 0]), conv.bias
    return made
