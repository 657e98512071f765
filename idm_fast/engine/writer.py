"""What the lowering of every network is written with: a convolution, the norm before it, an attention."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch

from idm_fast.engine.nodes import Attend, Coefficients, Conv, Node, StatsValue, Value, Weight
from idm_fast.models.blocks import Attention, NormSiLU


class Image(NamedTuple):
    value: Value
    stats: StatsValue


class Writer:
    """Appends to ``nodes``. ``turned``: the images lie turned by 180 degrees, and so do the kernels of 3x3."""

    def __init__(self, batch: int, dtype: torch.dtype, turned: bool = False) -> None:
        self.n, self.dtype, self.turned = batch, dtype, turned
        self.nodes: list[Node] = []

    def conv(self, path: str, x: Value, out_channels: int, **rest: Any) -> Image:
        """The convolution at ``path``; ``rest``: further fields of its node."""
        upsample, stride = rest.get("upsample", False), rest.get("stride", 1)
        n, _, h, w = x.shape
        grid = (2 * h, 2 * w) if upsample else ((h - 1) // stride + 1, (w - 1) // stride + 1)
        out = Value(path, (n, out_channels, *grid), self.dtype)
        stats = StatsValue(f"{path}.stats", out)
        rest.setdefault("weight", Weight(f"{path}.weight", "phases" if upsample else self.form(rest.get("kernel", 3))))
        rest.setdefault("bias", (Weight(f"{path}.bias", "vector"),))
        self.nodes.append(Conv(layer=path, x=x, out=out, out_stats=stats, **rest))
        return Image(out, stats)

    def form(self, kernel: int) -> Any:
        return "turned" if self.turned and kernel > 1 else "conv"

    def coefficients(self, path: str, norm: NormSiLU, x: Image) -> Value:
        """What the norm at ``path`` makes of the statistics of ``x``, for the convolution behind it."""
        out = Value(f"{path}.coefficients", (self.n, 3, x.value.shape[1]), torch.float32)
        self.nodes.append(Coefficients(layer=path, stats=x.stats, norm=path, groups=norm.groups, eps=norm.eps, out=out))
        return out

    def normed_conv(self, norm: str, path: str, module: NormSiLU, x: Image, out_channels: int, **rest: Any) -> Image:
        """The convolution at ``path`` behind the norm (and SiLU) at ``norm``."""
        coefficients = self.coefficients(norm, module, x)
        return self.conv(path, x.value, out_channels, coefficients=coefficients, silu=module.silu, **rest)

    def attention(self, module: Attention, path: str, x: Image) -> Image:
        c = x.value.shape[1]
        if module.norm is None or module.scale != 1:
            raise TypeError(f"lower: {path} is an attention without a norm or with a scale, which has no lowering")
        qkv = self.normed_conv(f"{path}.norm", f"{path}.qkv", module.norm, x, 3 * c, kernel=1).value
        mixed = Value(f"{path}.mixed", x.value.shape, self.dtype)
        self.nodes.append(Attend(layer=path, qkv=qkv, heads=module.heads, order=module.order, out=mixed))
        return self.conv(f"{path}.out", mixed, c, kernel=1, residual=x.value)


def without_unread_stats(nodes: Sequence[Node]) -> tuple[Node, ...]:
    """Statistics cost a pass of the values in cache: nobody makes those that no norm asks for."""
    read = {value for node in nodes for value in node.reads}
    return tuple(
        replace(node, out_stats=None) if isinstance(node, Conv) and node.out_stats not in read else node
        for node in nodes
    )
