"""Identity recovery: the embedding of the clean face, from a degraded one (CLR-Face, 2402.06106).

Built as a low-rank change of the frozen recognition network (LoRA, 2106.09685) and not as a network of its own: of few
faces it must learn only what a degradation does to the features, not what a face is; untrained it is the recognition
network itself, and it costs what that costs (0.54 GFLOP).
"""

from __future__ import annotations

import copy
import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from idm_fast.errors import IdmFastError
from idm_fast.models.recognition import Recognition, crop_chip, weight_shapes

_LARGEST_SIDE = 1 << 16


@dataclass(frozen=True)
class IrnConfig:
    """``image_size``: side in pixels of the faces it was trained on; it takes any. A weight of at most ``free_weights``
    numbers changes freely, a larger one by a product of rank ``rank``: 0.79 M parameters with the defaults.
    """

    image_size: int = 128
    rank: int = 16
    free_weights: int = 40_000
    name: str = "irn"

    def __post_init__(self) -> None:
        if not 8 <= self.image_size <= _LARGEST_SIDE:
            raise IdmFastError(f"image_size must lie in 8..{_LARGEST_SIDE}, got {self.image_size}")
        if not 1 <= self.rank <= 128:
            raise IdmFastError(f"rank must lie in 1..128, got {self.rank}")
        if self.free_weights < 0:
            raise IdmFastError(f"free_weights must be >= 0, got {self.free_weights}")

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


class Change(nn.Module):
    """W + rms(W) d for a weight W [out, ...]: d is free, or up @ down of a lower rank. It begins with d = 0.

    In units of W's root mean square, one learning rate suits all layers.
    """

    def __init__(self, shape: tuple[int, ...], config: IrnConfig) -> None:
        super().__init__()
        rows, columns = shape[0], math.prod(shape[1:])
        self.down: nn.Parameter | None = None
        if rows * columns <= config.free_weights:
            self.up = nn.Parameter(torch.zeros(rows, columns))
        else:
            self.up = nn.Parameter(torch.zeros(rows, config.rank))
            # So that an element of d moves about as far as one of ``up``.
            self.down = nn.Parameter(torch.randn(config.rank, columns) / math.sqrt(config.rank))

    def forward(self, weight: Tensor) -> Tensor:
        change = self.up if self.down is None else self.up @ self.down
        return weight + weight.square().mean().sqrt() * change.float().view(weight.shape)


class Irn(nn.Module):
    """``irn(y, recognition)``: the recovered embedding [N, 128]. It holds the changes only, not the network changed."""

    def __init__(self, config: IrnConfig | None = None) -> None:
        super().__init__()
        self.config = config or IrnConfig()
        # Of modules, whose names cannot have dots.
        self.changes = nn.ModuleDict(
            {name.replace(".", "_"): Change(shape, self.config) for name, shape in weight_shapes().items()}
        )

    def forward(self, y: Tensor, recognition: Recognition) -> Tensor:
        """Embeddings [N, 128] float32 of degraded FFHQ-aligned crops ``y`` [N, 3, S, S] in [-1, 1] RGB, any S.

        ``recognition`` stays as it is; gradients reach the changes and ``y``. Raises ``ValueError`` for other shapes.
        """
        weights = dict(recognition.named_parameters()) | dict(recognition.named_buffers())
        changed = {name: self.changes[name.replace(".", "_")](weights[name]) for name in weight_shapes()}
        # A call's own modules on the same tensors: functional_call puts others into them for its time, and another
        # thread may be using ``recognition``.
        own = copy.deepcopy(recognition, {id(tensor): tensor for tensor in weights.values()})
        embeddings: Tensor = functional_call(own, changed, (crop_chip(y),))
        return embeddings


IRN_PRESETS: dict[str, IrnConfig] = {"irn-128": IrnConfig(name="irn-128")}
