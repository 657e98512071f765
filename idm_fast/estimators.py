"""Estimates of the clean face by regression: what a chain that starts in the middle is given to start from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from idm_fast.face_model import FaceModel
from idm_fast.models.swinir import SwinIR
from idm_fast.sampling import SampleSettings

_OTHER = 1 << 62  # seeds of pictures are below: noise that the chain behind the estimate does not draw again


class Estimator(Protocol):
    """An estimate of clean crops: ``y`` [N, 3, S, S] float32 in [-1, 1] -> the same, on y's device.

    ``seeds`` int64 [N]: of each crop, for an estimator that draws noise.
    """

    def __call__(self, y: Tensor, seeds: Tensor) -> Tensor: ...


class Bicubic:
    """The degraded crop itself, which cutting it out has brought to its size bicubically: the simplest estimate."""

    def __call__(self, y: Tensor, seeds: Tensor) -> Tensor:
        return y


class OneStep:
    """What our own restorers give in one step, whose answer is close to the mean of all plausible faces.

    ``models``: of one family; the largest is taken whose size the crop reaches, else the smallest. A crop of another
    size is resized there and back.
    """

    def __init__(self, models: Sequence[FaceModel]) -> None:
        self.models = sorted(models, key=lambda model: model.size)

    def __call__(self, y: Tensor, seeds: Tensor) -> Tensor:
        side = y.shape[-1]
        model = next((each for each in reversed(self.models) if each.size <= side), self.models[0])
        crop = y if model.size == side else _resized(y, model.size)
        restored = model.restore(crop, seeds ^ _OTHER, SampleSettings(steps=1)).to(y.device)
        return restored if model.size == side else _resized(restored, side)


class Regression:
    """A SwinIR, in float32: it runs once. S must be a multiple of its ``size_multiple`` (64)."""

    def __init__(self, module: SwinIR, device: torch.device) -> None:
        self.module = module.to(device, torch.float32).eval()

    @torch.no_grad()
    def __call__(self, y: Tensor, seeds: Tensor) -> Tensor:
        # One by one: a 512-px crop's widest images are 67 MB each.
        parts = [self.module((crop[None] + 1) / 2) for crop in y]
        return torch.cat(parts).mul_(2).sub_(1)


def _resized(images: Tensor, side: int) -> Tensor:
    made = interpolate(images, (side, side), mode="bicubic", antialias=True)
    return made.clamp_(-1, 1)
