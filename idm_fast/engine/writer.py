"""What the lowering of every network is written with: a convolution, the norm before it, an attention."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch

from idm_fast.engine.nodes import Attend, Coefficients, Columns, Conv, Node, StatsValue, Value, Weight
from idm_fast.models.blocks import Attention, NormSiLU

Shape = tuple[int, int, int]  # N, H, W of the pictures


class Image(NamedTuple):
    value: Value
    stats: StatsValue


class Writer:
    """Appends to ``nodes``, for N images in ``dtype``."""

    def __init__(self, batch: int, dtype: torch.dtype) -> None:
        self.n, self.dtype = batch, dtype
        self.nodes: list[Node] = []

    def conv(
        self,
        path: str,
        x: Value,
        out_channels: int,
        *,
        quantise: str | None = None,  # path of the norm before it, where 8 bits will do
        scale: Columns | None = None,  # of that norm
        shift: Columns | None = None,
        **rest: Any,
    ) -> Image:
        """The convolution at ``path``; ``rest``: further fields of its node."""
        upsample, stride = rest.get("upsample", False), rest.get("stride", 1)
        n, _, h, w = x.shape
        grid = (2 * h, 2 * w) if upsample else ((h - 1) // stride + 1, (w - 1) // stride + 1)
        out = Value(path, (n, out_channels, *grid), self.dtype, self.outlives(path))
        stats = StatsValue(f"{path}.stats", out)
        rest.setdefault("weight", Weight(f"{path}.weight", "phases" if upsample else "conv"))
        rest.setdefault("bias", (Weight(f"{path}.bias", "vector"),))
        if quantise is not None:
            rest |= self.eight_bits(quantise, scale, shift, rest.get("silu", False))
        self.nodes.append(Conv(layer=path, x=x, out=out, out_stats=stats, **rest))
        return Image(out, stats)

    def outlives(self, path: str) -> bool:
        """Whether what the convolution at ``path`` writes keeps its own memory."""
        return False

    def eight_bits(self, norm: str, scale: Columns | None, shift: Columns | None, silu: bool) -> dict[str, Any]:
        """Fields of a convolution behind ``norm`` that make it one of 8 bits; none where the plan is not lossy."""
        return {}

    def coefficients(
        self,
        path: str,
        norm: NormSiLU,
        x: Image,
        skip: Image | None = None,
        scale: Columns | None = None,
        shift: Columns | None = None,
    ) -> Value:
        """What the norm at ``path`` makes of the statistics of ``x`` (and ``skip``), for the convolution behind it."""
        channels = x.value.shape[1] + (0 if skip is None else skip.value.shape[1])
        out = Value(f"{path}.coefficients", (self.n, 3, channels), torch.float32)
        self.nodes.append(
            Coefficients(
                layer=path, stats=x.stats, skip_stats=None if skip is None else skip.stats, norm=path,
                groups=norm.groups, eps=norm.eps, scale=scale, shift=shift, out=out,
            )
        )  # fmt: skip
        return out

    def attention(self, module: Attention, path: str, x: Image) -> Image:
        c = x.value.shape[1]
        normed: dict[str, Any] = {}
        if module.norm is not None:
            norm = f"{path}.norm"
            normed = {"quantise": norm, "coefficients": self.coefficients(norm, module.norm, x)}
        qkv = self.conv(f"{path}.qkv", x.value, 3 * c, kernel=1, **normed).value
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
