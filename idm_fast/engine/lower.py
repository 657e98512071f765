"""A network and a shape -> the list of calls that compute it. No arithmetic and no memory: what runs is decided here.

Every image carries the statistics that its producer wrote beside it, so a norm is one small call (its coefficients)
and the convolution behind it applies it on the way in. What depends on the condition alone runs once per walk.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from idm_fast.engine.lossy import TIERS
from idm_fast.engine.nodes import (
    Advance,
    Columns,
    Conv,
    EightBit,
    Node,
    Norm,
    Resample,
    SpreadNoise,
    TimeRow,
    Turn,
    Unshuffle,
    Update,
    Value,
    Weight,
)
from idm_fast.engine.writer import Image, Shape, Writer, without_unread_stats
from idm_fast.models.blocks import Downsample, NormSiLU, ResBlock, Upsample
from idm_fast.models.unet import Level, UNet


@dataclass(frozen=True)
class Projection:
    """A block's columns of the time row: the embedding times ``weight``, plus the sum of ``biases``."""

    weight: Weight
    biases: tuple[Weight, ...]


@dataclass(frozen=True)
class Range:
    """Columns of the time row: what makes 8 bits of the values that a norm (and SiLU) can give."""

    tier: EightBit
    norm: str
    columns: Columns
    scale: Columns | None
    shift: Columns | None
    silu: bool


@dataclass(frozen=True)
class Lowered:
    """``setup`` runs once per walk, ``step`` once per evaluation of the network. The fixed values are its ends."""

    setup: tuple[Node, ...]
    step: tuple[Node, ...]
    projections: tuple[Projection, ...]  # of them the time row is made, first their columns,
    ranges: tuple[Range, ...]  # then those of each of these
    x: Value  # float32 [N, C, H, W]
    history: Value
    cond: Value | None  # float32 [N, Cc, H, W]
    inner: tuple[int, int] = (0, 0)  # of ``step``, the nodes below the finest resolution: begin and end


def lower(
    model: UNet,
    shape: Shape,
    dtype: torch.dtype,
    *,
    quantised: EightBit | None = None,
    reusable: bool = False,
    learned_variance: bool = False,
) -> Lowered:
    """The plan of ``model`` for N images of H x W pixels in ``dtype``.

    ``quantised``: a convolution behind a norm is done on 8-bit numbers, but for the network's last. ``reusable``: what
    the inner levels give back to the finest resolution outlives the step, so that the next may leave them out.
    ``learned_variance``: the table has one, and the network says it in the second half of its output.
    """
    return _Lowering(model, shape, dtype, quantised, reusable).run(learned_variance)


class _Lowering(Writer):
    def __init__(
        self, model: UNet, shape: Shape, dtype: torch.dtype, quantised: EightBit | None, reusable: bool
    ) -> None:
        super().__init__(shape[0], dtype)
        self.model, self.config, self.quantised = model, model.config, quantised
        self.descends = next((i for i, level in enumerate(_levels(model.down)) if _resizes(level)), None)
        self.ascends = max((i for i, level in enumerate(_levels(model.up)) if _resizes(level)), default=None)
        self.kept = f"up.{self.ascends}." if reusable else None  # the level whose last value outlives the step
        _, self.height, self.width = shape
        self.projections: list[Projection] = []
        self.ranges: list[Range] = []
        self.projected = sum(m.embed.out_features for m in model.modules() if isinstance(m, ResBlock))
        self.columns = 0  # of them, given to blocks so far
        self.scaled = self.projected  # columns given so far, those of ``ranges`` behind the projections among them

    # The whole network.

    def run(self, learned_variance: bool) -> Lowered:
        c, f = self.config, self.config.unshuffle
        full = (self.n, c.in_channels, self.height, self.width)
        x, history = (Value(name, full, torch.float32, fixed=True) for name in ("x", "history"))
        inside = (self.height // f, self.width // f)
        entry = Value("network_input", (self.n, c.in_channels * f * f, *inside), self.dtype, fixed=True)
        setup: list[Node] = [Unshuffle(layer="stem", x=x, factor=f, out=entry)]
        cond, half = None, None
        if c.cond_channels:
            cond = Value("cond", (self.n, c.cond_channels, self.height, self.width), torch.float32, fixed=True)
            half = self._condition_half(setup, cond, inside)

        self.nodes.append(TimeRow(layer="time"))
        h = self._stem(self._upside("stem", entry), half)
        skips = [h]
        begin = end = 0
        for index, level in enumerate(_levels(self.model.down)):
            begin = len(self.nodes) if index == self.descends else begin
            h = self._level(level, f"down.{index}", h)
            skips.append(h)
        for index, level in enumerate(_levels(self.model.middle)):
            h = self._level(level, f"middle.{index}", h)
        for index, level in enumerate(_levels(self.model.up)):
            joins = isinstance(level.block, ResBlock) and level.block.resize is None
            h = self._level(level, f"up.{index}", h, skips.pop() if joins else None)
            end = len(self.nodes) if index == self.ascends else end
        answer, v = self._output(h, learned_variance)
        if v is not None:
            scratch = Value("sampler.scratch", full, torch.float32)
            self.nodes.append(SpreadNoise(layer="sampler", v=v, unshuffle=f, out_history=history, out_scratch=scratch))
        self.nodes.append(
            Update(
                layer="sampler", answer=answer, base=cond if c.residual else None, unshuffle=f,
                out_x=x, out_history=history, out_input=entry,
            )
        )  # fmt: skip
        self.nodes.append(Advance(layer="sampler"))
        step = without_unread_stats(self.nodes)
        return Lowered(tuple(setup), step, tuple(self.projections), tuple(self.ranges), x, history, cond, (begin, end))

    def _upside(self, path: str, x: Value) -> Value:
        """``x`` as the network lies, or from there back. Padding on one side becomes padding on all sides by turning
        the image and every 3x3 kernel (``weights.py``): in an even image the window that began at 2 i begins at
        2 j - 1. What is added to the walk are these two copies of a few channels."""
        if not self.config.turned:
            return x
        out = Value(f"{path}.turned", x.shape, x.dtype)
        self.nodes.append(Turn(layer=path, x=x, out=out))
        return out

    def _stem_columns(self) -> tuple[Columns, Columns]:
        """Of the stem's input channels: those of x, those of the condition."""
        c, area = self.config, self.config.unshuffle**2
        x, cond = c.in_channels * area, c.cond_channels * area
        return ((0, x), (x, x + cond)) if c.concat_order == "x_cond" else ((cond, cond + x), (0, cond))

    def _condition_half(self, setup: list[Node], cond: Value, inside: tuple[int, int]) -> Value:
        """The stem is linear: its share of the condition is the same at every step."""
        c, f = self.config, self.config.unshuffle
        hint = Value("stem.hint", (self.n, c.cond_channels * f * f, *inside), self.dtype, fixed=True)
        half = Value("stem.cond_half", (self.n, c.stem_width, *inside), self.dtype, fixed=True)
        weight = Weight("stem.weight", "conv", columns=self._stem_columns()[1])
        setup.append(Unshuffle(layer="stem", x=cond, factor=f, turned=c.turned, out=hint))
        setup.append(Conv(layer="stem", x=hint, weight=weight, bias=(Weight("stem.bias", "vector"),), out=half))
        return half

    def _stem(self, entry: Value, half: Value | None) -> Image:
        bias = () if half is not None else (Weight("stem.bias", "vector"),)
        weight = Weight("stem.weight", "conv", columns=self._stem_columns()[0])
        return self.conv("stem", entry, self.config.stem_width, weight=weight, bias=bias, residual=half)

    def _level(self, level: Level, path: str, h: Image, skip: Image | None = None) -> Image:
        block = level.block
        if isinstance(block, ResBlock):
            h = self._block(block, f"{path}.block", h, skip)
        elif isinstance(block, Downsample):
            h = self.conv(f"{path}.block.conv", h.value, block.conv.out_channels, stride=2)
        elif isinstance(block, Upsample):
            h = self.conv(f"{path}.block.conv", h.value, block.conv.out_channels, upsample=True)
        else:
            raise TypeError(f"lower: {path} is a {type(block).__name__}, which has no lowering")
        return h if level.attention is None else self.attention(level.attention, f"{path}.attention", h)

    def _output(self, h: Image, learned_variance: bool) -> tuple[Value, Value | None]:
        """What the update reads, and the variance behind it where the table asks for one."""
        c = self.config
        channels, all_channels = c.in_channels * c.unshuffle**2, c.out_channels * c.unshuffle**2
        coefficients = self.coefficients("out_norm", self.model.out_norm, h)

        def part(rows: Columns | None) -> Value:
            made = self.conv(
                "out_conv", h.value, channels, weight=Weight("out_conv.weight", "conv", rows=rows),
                bias=(Weight("out_conv.bias", "vector", rows=rows),), coefficients=coefficients, silu=True,
            )  # fmt: skip
            return self._upside("out_conv", made.value)

        answer = part((0, channels) if channels < all_channels else None)
        return answer, part((channels, 2 * channels)) if learned_variance else None

    # Its parts.

    def _block(self, block: ResBlock, path: str, x: Image, skip: Image | None) -> Image:
        first = self._project(path, block)
        scale, shift = first if block.scale_shift else (None, None)
        out_channels = block.conv1.out_channels
        # The convolution's own bias is in the time row already.
        additive: dict[str, Any] = {} if block.scale_shift else {"bias": (), "time_shift": first[0]}
        if block.resize == "down":
            h = self.conv(f"{path}.conv1", self._pooled_norm(path, block.norm1, x), out_channels, **additive)
        else:
            h = self.conv(
                f"{path}.conv1", x.value, out_channels, skip=None if skip is None else skip.value,
                coefficients=self.coefficients(f"{path}.norm1", block.norm1, x, skip), silu=True,
                upsample=block.resize == "up", quantise=f"{path}.norm1", **additive,
            )  # fmt: skip
        ends = self._shortcut(block, path, x, skip)
        return self.conv(
            f"{path}.conv2", h.value, out_channels, silu=True, quantise=f"{path}.norm2", scale=scale, shift=shift,
            coefficients=self.coefficients(f"{path}.norm2", block.norm2, h, scale=scale, shift=shift), **ends,
        )  # fmt: skip

    def _project(self, path: str, block: ResBlock) -> list[Columns]:
        """Room in the time row: (scale, shift), or the one shift."""
        weight = Weight(f"{path}.embed.weight", "matrix")
        biases = [Weight(f"{path}.embed.bias", "vector")]
        if not block.scale_shift:
            biases.append(Weight(f"{path}.conv1.bias", "vector"))
        self.projections.append(Projection(weight, tuple(biases)))
        begin, c = self.columns, block.conv1.out_channels
        self.columns += block.embed.out_features
        return [(first, first + c) for first in range(begin, self.columns, c)]

    def _pooled_norm(self, path: str, norm: NormSiLU, x: Image) -> Value:
        """A pool takes the mean of what SiLU gave: it cannot be a convolution's prologue."""
        normed = Value(f"{path}.normed", x.value.shape, self.dtype)
        self.nodes.append(
            Norm(
                layer=f"{path}.norm1", x=x.value, stats=x.stats, norm=f"{path}.norm1", groups=norm.groups, eps=norm.eps,
                out=normed,
            )
        )  # fmt: skip
        return self._resample(f"{path}.norm1", normed, up=False)

    def _shortcut(self, block: ResBlock, path: str, x: Image, skip: Image | None) -> dict[str, Any]:
        """What the block adds to its second convolution's result."""
        if block.resize is not None:
            return {"residual": self._resample(path, x.value, block.resize == "up")}
        if isinstance(block.skip, torch.nn.Identity):
            return {"residual": x.value}
        second = None if skip is None else skip.value
        weight, bias = Weight(f"{path}.skip.weight", "matrix"), Weight(f"{path}.skip.bias", "vector")
        if not self.quantised:
            both = (Weight(f"{path}.conv2.bias", "vector"), bias)
            return {"shortcut": x.value, "shortcut_skip": second, "shortcut_weight": weight, "bias": both}
        alone = self.conv(
            f"{path}.skip", x.value, block.conv2.out_channels, skip=second, kernel=1,
            weight=Weight(f"{path}.skip.weight", "conv"), bias=(bias,),
        )  # fmt: skip
        return {"residual": alone.value}

    def _resample(self, path: str, x: Value, up: bool) -> Value:
        n, c, h, w = x.shape
        out = Value(f"{path}.resized", (n, c, 2 * h, 2 * w) if up else (n, c, h // 2, w // 2), self.dtype)
        self.nodes.append(Resample(layer=path, x=x, up=up, out=out))
        return out

    def outlives(self, path: str) -> bool:
        return self.kept is not None and path.startswith(self.kept)

    def eight_bits(self, norm: str, scale: Columns | None, shift: Columns | None, silu: bool) -> dict[str, Any]:
        if self.quantised is None:
            return {}
        columns = (self.scaled, self.scaled + TIERS[self.quantised].columns)
        self.scaled = columns[1]
        self.ranges.append(Range(self.quantised, norm, columns, scale, shift, silu))
        return {"quantised": self.quantised, "activation": columns}


def _levels(modules: torch.nn.ModuleList) -> list[Level]:
    return [level for level in modules if isinstance(level, Level)]


def _resizes(level: Level) -> bool:
    return isinstance(level.block, Downsample | Upsample) or level.block.resize is not None
