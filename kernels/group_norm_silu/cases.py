"""Inputs of group_norm_silu: layers of real networks, and awkward ones."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from idm_fast.kernels.case import Case, Inputs, Outputs, Suite, element_size, poison, to_float64
from idm_fast.kernels.group_norm_silu import group_norm_silu
from idm_fast.kernels.group_norm_silu.reference import group_norm_silu as reference

Fill = Callable[[Tensor], Tensor]  # standard normal noise -> values of x


def shifted(noise: Tensor) -> Tensor:
    return noise * 0.5 - 2.3


def far_mean(noise: Tensor) -> Tensor:
    return noise + 1000.0


def constant_channels(noise: Tensor) -> Tensor:
    return torch.ones_like(noise) * torch.linspace(-3, 3, noise.shape[1])[None, :, None, None]


def constant(noise: Tensor) -> Tensor:
    return torch.full_like(noise, -2.3)


def outliers(noise: Tensor) -> Tensor:
    x = noise * 1e-2
    x[:, ::3, 0, 0] = 300.0
    return x


def near_limit(noise: Tensor) -> Tensor:
    return 6e4 + noise * 500.0


def case(
    name: str,
    why: str,
    shape: tuple[int, int, int, int],
    groups: int,
    fill: Fill = shifted,
    *,
    affine: bool = True,
    time: bool = False,
    silu: bool = True,
    eps: float = 1e-5,
    parameters: torch.dtype | None = None,  # None: that of x
    layer: bool = False,
) -> Case:
    n, c, h, w = shape

    def make(dtype: torch.dtype, generator: Generator) -> Inputs:
        x = fill(torch.randn(shape, generator=generator)).to(dtype).contiguous(memory_format=torch.channels_last)
        inputs: Inputs = {"x": x, "num_groups": groups, "eps": eps, "silu": silu}
        if affine:
            inputs["weight"] = (1 + 0.3 * torch.randn(c, generator=generator)).to(parameters or dtype)
            inputs["bias"] = (0.3 * torch.randn(c, generator=generator)).to(parameters or dtype)
        if time:  # two halves of one projection, as the networks have them
            projection = (0.3 * torch.randn(n, 2 * c, generator=generator)).to(dtype)
            inputs["scale"], inputs["shift"] = projection.chunk(2, dim=1)
        return inputs

    elements = n * c * h * w
    return Case(name, why, make, lambda dtype: 2 * elements * element_size(dtype), 20 * elements, layer)


CASES = [
    case("idm128_64px", "idm-128: first level at 64 px", (1, 64, 64, 64), 32, layer=True),
    case("idm128_32px", "idm-128: second level", (1, 128, 32, 32), 32, time=True, layer=True),
    case("idm128_16px", "idm-128: third level", (1, 192, 16, 16), 32, layer=True),
    case("idm128_64px_b16", "idm-128: first level, a batch of faces", (16, 64, 64, 64), 32, layer=True),
    case("one_pixel", "1 x 1 positions: a group is its channels", (2, 64, 1, 1), 4),
    case("one_value", "one value a group: variance 0", (1, 13, 1, 1), 13),
    case("odd", "odd sizes, C no multiple of any vector", (2, 21, 7, 5), 3),
    case("layer_norm", "G = 1: one group over everything", (3, 6, 3, 3), 1, time=True),
    case("instance_norm", "G = C: every channel its own group", (1, 10, 9, 4), 10),
    case("straddling", "groups of 5 channels straddle every vector and tile", (1, 90, 6, 6), 18, time=True),
    case("many_rows", "more rows than one piece or tile holds", (1, 8, 70, 61), 4),
    case("float_parameters", "float32 parameters of a 16-bit tensor", (1, 24, 5, 5), 6, parameters=torch.float32),
    case("plain", "no parameters, no SiLU", (2, 32, 8, 8), 4, affine=False, silu=False),
    case("large_eps", "eps 1e-1 is not lost", (1, 32, 4, 4), 8, lambda x: x * 0.1, eps=1e-1),
    case("far_mean", "mean 1000 sigma: E[x^2] - E[x]^2 would fail", (1, 64, 16, 16), 4, far_mean),
    case("constant_channels", "constant channels of different values", (1, 32, 8, 8), 4, constant_channels),
    case("constant", "variance exactly 0", (1, 32, 8, 8), 4, constant),
    case("outliers", "one-hot outliers 3e4 sigma", (2, 48, 8, 8), 4, outliers),
    case("near_limit", "values near the largest of float16", (1, 32, 8, 8), 8, near_limit),
]


def call(inputs: Inputs) -> Outputs:
    return {"out": group_norm_silu(**inputs, out=poison(inputs["x"]))}


def exact(inputs: Inputs) -> Outputs:
    i = to_float64(inputs)
    x, groups, weight, bias = i["x"], i["num_groups"], i.get("weight"), i.get("bias")
    return {"out": reference(x, groups, weight, bias, i["eps"], i.get("scale"), i.get("shift"), i["silu"], None)}


def eager(inputs: Inputs) -> Tensor:
    x, weight, bias = inputs["x"], inputs.get("weight"), inputs.get("bias")
    y = F.group_norm(x, inputs["num_groups"], weight, bias, inputs["eps"])
    if "scale" in inputs:
        y = y * (1 + inputs["scale"][:, :, None, None]) + inputs["shift"][:, :, None, None]
    return F.silu(y) if inputs["silu"] else y


SUITE = Suite(CASES, (torch.float32, torch.bfloat16, torch.float16), group_norm_silu, call, exact, eager)
