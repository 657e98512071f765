"""What a plan is made of: values that live in buffers, and nodes, each one call of an operation.

Nothing here computes or allocates: a node says what is read, what is written and which weights it takes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Literal

import torch

from idm_fast.config import QkvOrder


@dataclass(frozen=True, eq=False)
class Value:
    """A tensor of a plan, known by its identity. Four dimensions mean [N, C, H, W] in channels_last memory.

    ``fixed``: keeps its own memory, because it is written outside the plan's step or outlives it.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    fixed: bool = False

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True, eq=False)
class StatsValue:
    """``ChannelStats`` of an image [N, C, H, W]; into how many pieces it is cut its producer's backend decides."""

    name: str
    image: Value

    @property
    def fixed(self) -> bool:
        return self.image.fixed


EightBit = Literal["int8", "fp8"]  # the lossy tiers: lossy.py
Columns = tuple[int, int]  # begin and end, of a block's columns in the time row or of channels of a weight


@dataclass(frozen=True)
class Weight:
    """A parameter of the network by its name in the state dict, and what is made of it (weights.py)."""

    name: str
    form: Literal["conv", "phases", "matrix", "vector"]
    rows: Columns | None = None  # of the output channels; None: all
    columns: Columns | None = None  # of the input channels


Operand = Value | StatsValue


@dataclass(frozen=True, kw_only=True)
class Node:
    """One call. ``layer`` is the path of the module it comes from; ``backend`` is known once it is bound."""

    layer: str
    backend: str = ""

    op = ""  # the operation's name in ``OPS``, or that of a copy

    @property
    def reads(self) -> tuple[Operand, ...]:
        return tuple(v for name, v in self._operands() if not name.startswith("out"))

    @property
    def writes(self) -> tuple[Operand, ...]:
        return tuple(v for name, v in self._operands() if name.startswith("out"))

    def _operands(self) -> list[tuple[str, Operand]]:
        values = ((item.name, getattr(self, item.name)) for item in fields(self))
        return [(name, value) for name, value in values if isinstance(value, Value | StatsValue)]

    @property
    def flops(self) -> int:
        """Twice the multiply-accumulates of the call, as it does them: four 2x2 phases, not nine taps."""
        return 0

    @property
    def weight_bytes(self) -> int:
        return 0

    @property
    def activation_bytes(self) -> int:
        """Bytes of images read once and written once."""
        return sum(v.nbytes for v in (*self.reads, *self.writes) if isinstance(v, Value))

    @property
    def bytes(self) -> int:
        return self.weight_bytes + self.activation_bytes


@dataclass(frozen=True, kw_only=True)
class TimeRow(Node):
    """Row ``step`` of the table of all steps, into the buffer [1, S] that every block reads its columns of."""

    op = "time_row"


@dataclass(frozen=True, kw_only=True)
class Coefficients(Node):
    """``norm_coefficients``: statistics to the prologue of a convolution. ``norm``: path of the norm's parameters."""

    stats: StatsValue
    skip_stats: StatsValue | None = None
    norm: str
    groups: int
    eps: float
    scale: Columns | None = None  # in the time row
    shift: Columns | None = None
    out: Value
    op = "norm_coefficients"


@dataclass(frozen=True, kw_only=True)
class Conv(Node):
    """``conv2d``. ``quantised``: as ``conv2d_int8`` or ``conv2d_fp8``, with its own columns of the row."""

    x: Value
    skip: Value | None = None
    weight: Weight
    bias: tuple[Weight, ...] = ()  # their sum
    kernel: int = 3
    stride: int = 1
    upsample: bool = False
    coefficients: Value | None = None
    silu: bool = False
    shortcut: Value | None = None
    shortcut_skip: Value | None = None
    shortcut_weight: Weight | None = None
    time_shift: Columns | None = None
    residual: Value | None = None
    quantised: EightBit | None = None
    activation: Columns | None = None
    out: Value
    out_stats: StatsValue | None = None

    @property
    def op(self) -> str:  # type: ignore[override]
        return f"conv2d_{self.quantised}" if self.quantised else "conv2d"

    @property
    def channels(self) -> int:
        return self.x.shape[1] + (self.skip.shape[1] if self.skip is not None else 0)

    @property
    def _products(self) -> tuple[int, int]:
        """Weights per output channel: of the convolution as it is done at one position, and of the shortcut."""
        taps = 4 if self.upsample else self.kernel**2
        ends = (self.shortcut, self.shortcut_skip)
        return taps * self.channels, sum(v.shape[1] for v in ends if v is not None)

    @property
    def flops(self) -> int:
        return 2 * math.prod(self.out.shape) * sum(self._products)

    @property
    def weight_bytes(self) -> int:
        products, shortcut = self._products
        size = 1 if self.quantised else self.x.dtype.itemsize
        phases = 4 if self.upsample else 1
        return self.out.shape[1] * (phases * products * size + shortcut * self.x.dtype.itemsize)


@dataclass(frozen=True, kw_only=True)
class Norm(Node):
    """``group_norm_silu``: for what a convolution cannot take as its prologue, because a pool comes between."""

    x: Value
    stats: StatsValue
    norm: str
    groups: int
    eps: float
    out: Value
    op = "group_norm_silu"


@dataclass(frozen=True, kw_only=True)
class Attend(Node):
    """``attention`` on the queries, keys and values of one projection [N, 3 C, H, W]."""

    qkv: Value
    heads: int
    order: QkvOrder
    out: Value
    op = "attention"

    @property
    def flops(self) -> int:
        n, c, h, w = self.out.shape
        return 4 * n * c * (h * w) ** 2


@dataclass(frozen=True, kw_only=True)
class Resample(Node):
    """``resample2x``: every position four times (``up``), or the mean of 2 x 2."""

    x: Value
    up: bool
    out: Value
    op = "resample2x"


@dataclass(frozen=True, kw_only=True)
class Unshuffle(Node):
    """float32 [N, C, H, W] -> pixel_unshuffle of it in the network's dtype; ``turned``: then turned by 180 degrees."""

    x: Value
    factor: int
    turned: bool = False
    out: Value
    op = "unshuffle"


@dataclass(frozen=True, kw_only=True)
class Turn(Node):
    """An image turned by 180 degrees."""

    x: Value
    out: Value
    op = "turn"


@dataclass(frozen=True, kw_only=True)
class Shuffle(Node):
    """What a network ends with -> pixel_shuffle of it in float32; ``turned``: turned by 180 degrees before."""

    x: Value
    factor: int
    turned: bool = False
    out: Value
    op = "shuffle"


@dataclass(frozen=True, kw_only=True)
class Nearest(Node):
    """``vq_nearest``: the nearest code of each position, as an image and as numbers."""

    x: Value
    codebook: Weight
    out: Value
    out_codes: Value
    op = "vq_nearest"


@dataclass(frozen=True, kw_only=True)
class Update(Node):
    """``sampler_update``: x, history and the network's next input, all written in place.

    ``answer`` is as the network's last convolution stores it; ``base``: the condition, where the network is residual.
    """

    answer: Value
    base: Value | None
    out_x: Value
    out_history: Value
    out_input: Value
    unshuffle: int
    op = "sampler_update"


@dataclass(frozen=True, kw_only=True)
class SpreadNoise(Node):
    """exp(spread v) noise into the history, before the update of a learned variance. ``v`` is as the network stores it;
    ``out_scratch``, like x, is what drawing the noise leaves behind."""

    v: Value
    unshuffle: int
    out_history: Value
    out_scratch: Value
    op = "spread_noise"


@dataclass(frozen=True, kw_only=True)
class Advance(Node):
    """The step counter, plus one."""

    op = "advance"
