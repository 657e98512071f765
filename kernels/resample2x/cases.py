"""Inputs of resample2x: the identity paths of guided-diffusion's resizing blocks, and awkward shapes."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Generator

from idm_fast.kernels.case import Case, Inputs, Outputs, Suite, element_size, to_float64
from idm_fast.kernels.resample2x import resample2x
from idm_fast.kernels.resample2x.reference import resample2x as reference


def case(
    name: str, why: str, shape: tuple[int, int, int, int], *, up: bool, scale: float = 1.0, layer: bool = False
) -> Case:
    n, c, h, w = shape
    elements = n * c * h * w

    def make(dtype: torch.dtype, generator: Generator) -> Inputs:
        x = (scale * (torch.randn(shape, generator=generator) - 2.3)).to(dtype)
        return {"x": x.contiguous(memory_format=torch.channels_last), "up": up}

    def bytes_moved(dtype: torch.dtype) -> int:
        return (elements * 5 if up else elements * 5 // 4) * element_size(dtype)

    return Case(name, why, make, bytes_moved, elements, layer, timed_only=elements > 2**20)


CASES = [
    case("up_32", "gd-256: from 32 px to 64", (1, 512, 32, 32), up=True, layer=True),
    case("up_128", "gd-256: from 128 px to 256", (1, 128, 128, 128), up=True, layer=True),
    case("down_64", "gd-256: from 64 px to 32", (1, 256, 64, 64), up=False, layer=True),
    case("down_256", "gd-256: from 256 px to 128", (1, 128, 256, 256), up=False, layer=True),
    case("up_odd", "odd sizes, three samples, channels that fill no vector", (3, 21, 5, 3), up=True),
    case("down_odd", "the same on the way down", (3, 21, 6, 10), up=False),
    case("up_one", "one position of one channel", (2, 1, 1, 1), up=True),
    case("down_one", "down to one position", (2, 5, 2, 2), up=False),
    case("down_wide", "whole vectors and a rest", (2, 72, 4, 6), up=False),
    case("down_large", "sums beyond float16, means within", (1, 16, 4, 4), up=False, scale=9e3),
]


def call(inputs: Inputs) -> Outputs:
    x, up = inputs["x"], inputs["up"]
    n, c, h, w = x.shape
    shape = (n, c, 2 * h, 2 * w) if up else (n, c, h // 2, w // 2)
    out = torch.full(shape, float("nan"), dtype=x.dtype, device=x.device).to(memory_format=torch.channels_last)
    return {"out": resample2x(x, up=up, out=out)}


def exact(inputs: Inputs) -> Outputs:
    x, up = to_float64(inputs)["x"], inputs["up"]
    n, c, h, w = x.shape
    out = torch.empty((n, c, 2 * h, 2 * w) if up else (n, c, h // 2, w // 2), dtype=x.dtype, device=x.device)
    reference(x, up, out)
    return {"out": out}


def eager(inputs: Inputs) -> torch.Tensor:
    if inputs["up"]:
        return F.interpolate(inputs["x"], scale_factor=2, mode="nearest")
    return F.avg_pool2d(inputs["x"], 2)


SUITE = Suite(CASES, (torch.float32, torch.bfloat16, torch.float16), resample2x, call, exact, eager)
