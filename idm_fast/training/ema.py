"""Exponential moving average of a model's weights, with a ramp so that short runs are averaged too."""

from __future__ import annotations

import copy
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn

Model = TypeVar("Model", bound=nn.Module)


class Ema(Generic[Model]):
    """``model`` is the averaged twin; after step s the decay is min(``decay``, (1 + s) / (10 + s))."""

    def __init__(self, model: Model, decay: float) -> None:
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self.decay = decay

    @torch.no_grad()
    def update(self, model: Model, step: int) -> None:
        keep = min(self.decay, (1 + step) / (10 + step))
        averaged: list[Tensor] = [*self.model.parameters()]
        torch._foreach_lerp_(averaged, [*model.parameters()], 1 - keep)
