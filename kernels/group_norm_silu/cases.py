"""Inputs of group_norm_silu: layers of real networks, and awkward ones."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from idm_fast.kernels.case import Case, Inputs, Outputs, Suite, element_size, to_float64
from idm_fast.kernels.channel_stats.cases import (
    Fill,
    constant,
    constant_channels,
    far_mean,
    image,
    late_outlier,
    near_limit,
    outliers,
    shifted,
)
from idm_fast.kernels.group_norm_silu import group_norm_silu
from idm_fast.kernels.group_norm_silu.reference import group_norm_silu as reference
from idm_fast.kernels.norm_coefficients.cases import stats_of

TESTED_ELEMENTS = 1_200_000


def case(
    name: str,
    why: str,
    shape: tuple[int, int, int, int],
    groups: int = 32,
    fill: Fill = shifted,
    *,
    skip: int = 0,  # channels of a second tensor
    stats: str = "",  # of which tensors statistics are given: "x", "skip", "x skip"
    sizes: tuple[int, ...] = (40, 23),  # of the pieces of x's
    affine: bool = True,
    time: bool = False,
    silu: bool = True,
    eps: float = 1e-5,
    parameters: torch.dtype | None = None,  # None: that of x
    into: bool = False,  # the caller has the room for the result
    layer: bool = False,
) -> Case:
    n, c1, h, w = shape
    c = c1 + skip

    def make(dtype: torch.dtype, generator: Generator) -> Inputs:
        x = image(shape, fill, dtype, generator)
        inputs: Inputs = {"x": x, "num_groups": groups, "eps": eps, "silu": silu}
        if skip:
            inputs["skip"] = image((n, skip, h, w), lambda noise: fill(noise) * 0.7, dtype, generator)
        if "x" in stats.split():
            inputs["stats"] = stats_of(x, list(sizes))
        if "skip" in stats.split():
            inputs["skip_stats"] = stats_of(inputs["skip"], [64])
        if into:
            inputs["out"] = torch.zeros((n, h, w, c), dtype=dtype).permute(0, 3, 1, 2)
        if affine:
            inputs["weight"] = (1 + 0.3 * torch.randn(c, generator=generator)).to(parameters or dtype)
            inputs["bias"] = (0.3 * torch.randn(c, generator=generator)).to(parameters or dtype)
        if time:  # two halves of one projection, as the networks have them
            projection = (0.3 * torch.randn(n, 2 * c, generator=generator)).to(dtype)
            inputs["scale"], inputs["shift"] = projection.chunk(2, dim=1)
        return inputs

    elements = n * c * h * w
    large = elements > TESTED_ELEMENTS
    return Case(name, why, make, lambda dtype: 2 * elements * element_size(dtype), 20 * elements, layer, large)


def foreign_stats() -> Case:
    """Statistics of another tensor: a kernel that makes its own instead of taking those given is seen."""

    def make(dtype: torch.dtype, generator: Generator) -> Inputs:
        x, other = (image((2, 24, 6, 6), fill, dtype, generator) for fill in (shifted, lambda noise: noise * 3 + 1))
        return {"x": x, "num_groups": 4, "stats": stats_of(other, [36])}

    return Case("foreign_stats", "statistics of another tensor", make, lambda dtype: 2 * 1728 * element_size(dtype))


def layer(
    network: str, pixels: int, channels: int, where: str, *, skip: int = 0, time: bool = False, into: bool = False
) -> Case:
    """``channels`` at ``pixels`` x ``pixels``; with ``skip`` both tensors of a layer of the way up."""
    name = f"{network.replace('-', '')}_{pixels}px_{channels}{f'_{skip}' if skip else ''}{'_into' if into else ''}"
    shape = (1, channels, pixels, pixels)
    return case(name, f"{network}: {where}", shape, skip=skip, time=time, into=into, layer=True)


IDM_128 = [  # every shape of the network
    layer("idm-128", 64, 64, "first level", time=True),
    layer("idm-128", 64, 64, "last layer of the way up", skip=64),
    layer("idm-128", 64, 128, "first layer at 64 px on the way up", skip=64),
    layer("idm-128", 32, 64, "second level, before it widens"),
    layer("idm-128", 32, 128, "second level", time=True),
    layer("idm-128", 32, 128, "way up", skip=64),
    layer("idm-128", 32, 128, "way up, both of one level", skip=128),
    layer("idm-128", 32, 192, "way up: groups of 10 straddle the seam", skip=128),
    layer("idm-128", 16, 128, "third level, before it widens"),
    layer("idm-128", 16, 192, "third level", time=True),
    layer("idm-128", 16, 192, "way up: groups of 10 straddle the seam", skip=128),
    layer("idm-128", 16, 192, "way up, both of one level", skip=192),
    case("idm128_attention", "idm-128: before attention, no SiLU", (1, 192, 16, 16), silu=False, layer=True),
    case("idm128_64px_b16", "idm-128: first level, a batch of faces", (16, 64, 64, 64), layer=True),
]
OTHERS = [
    layer("sr3-128", 128, 64, "first level"),
    layer("sr3-128", 128, 128, "way up", skip=64),
    layer("sr3-128", 16, 512, "fourth level"),
    layer("sr3-128", 8, 512, "last level"),
    layer("sr3-128", 16, 512, "way up", skip=256),
    layer("gd-256", 256, 128, "first level", time=True),
    layer("gd-256", 256, 128, "way up", skip=128),
    layer("gd-256", 256, 128, "way up, into memory that is there", skip=128, into=True),
    layer("gd-256", 128, 128, "second level", time=True),
    layer("gd-256", 64, 256, "third level", time=True),
    layer("gd-256", 8, 512, "last level", time=True),
    layer("difface-512", 512, 32, "first level", time=True),
    layer("difface-512", 512, 64, "way up", skip=32),
    layer("difface-512", 512, 64, "way up, into memory that is there", skip=32, into=True),
    layer("difface-512", 256, 64, "second level", time=True),
    layer("difface-512", 128, 256, "way up", skip=128),
]
AWKWARD = [
    case("one_pixel", "1 x 1 positions: a group is its channels", (2, 64, 1, 1), 4),
    case("one_value", "one value a group: variance 0", (1, 13, 1, 1), 13),
    case("odd", "odd sizes, C no multiple of any vector", (2, 21, 7, 5), 3),
    case("layer_norm", "G = 1: one group over everything", (3, 6, 3, 3), 1, time=True),
    case("wide_group", "G = 1: more channels a group than a tile has", (1, 150, 5, 3), 1),
    case("instance_norm", "G = C: every channel its own group", (1, 10, 9, 4), 10),
    case("straddling", "groups of 5 channels straddle every vector and tile", (1, 90, 6, 6), 18, time=True),
    case("many_rows", "more rows than one piece or tile holds", (1, 8, 70, 61), 4),
    case("two_pairs", "pairs of vectors, one vector and a rest", (1, 119, 5, 7), 7),
    case("float_parameters", "float32 parameters of a 16-bit tensor", (1, 24, 5, 5), 6, parameters=torch.float32),
    case("plain", "no parameters, no SiLU", (2, 32, 8, 8), 4, affine=False, silu=False),
    case("large_eps", "eps 1e-1 is not lost", (1, 32, 4, 4), 8, lambda x: x * 0.1, eps=1e-1),
    case("seam", "two tensors, groups of 9 straddle their odd seam", (2, 21, 5, 7), 5, skip=24, time=True),
    case("seam_one_group", "two tensors, one group", (1, 3, 4, 5), 1, skip=70),
    case("seam_apart", "two tensors, the seam between two groups", (2, 32, 4, 4), 8, skip=32),
    case("given", "statistics given", (2, 40, 9, 7), 5, stats="x", time=True),
    case("given_both", "statistics of both tensors given, in unlike pieces", (2, 30, 8, 9), 5, skip=15, stats="x skip"),
    case("given_skip", "statistics of the skip tensor given", (1, 10, 13, 10), 3, skip=8, stats="skip"),
    case("given_x", "statistics of the other given", (1, 10, 13, 10), 3, skip=8, stats="x"),
    case("given_many", "more pieces than a block merges by itself", (1, 12, 12, 14), 4, skip=8, stats="x", sizes=(1,)),
    foreign_stats(),
    case("far_mean", "mean 1000 sigma: E[x^2] - E[x]^2 would fail", (1, 64, 16, 16), 4, far_mean),
    case("constant_channels", "constant channels of different values", (1, 32, 8, 8), 4, constant_channels),
    case("constant", "variance exactly 0", (1, 32, 8, 8), 4, constant),
    case("outliers", "one-hot outliers 3e4 sigma", (2, 48, 8, 8), 4, outliers),
    case("late_outlier", "an outlier in the last row", (1, 48, 12, 11), 4, late_outlier),
    case("near_limit", "values near the largest of float16", (1, 32, 8, 8), 8, near_limit),
]
CASES = IDM_128 + OTHERS + AWKWARD


def call(inputs: Inputs) -> Outputs:
    x, skip = inputs["x"], inputs.get("skip")
    n, c, h, w = x.shape if skip is None else torch.cat([x, skip], 1).shape
    room = torch.full((n, h, w, c), float("nan"), dtype=x.dtype, device=x.device)
    return {"out": group_norm_silu(**inputs | {"out": room.permute(0, 3, 1, 2)})}


def exact(inputs: Inputs) -> Outputs:
    i = to_float64(inputs)
    x, skip, groups = i["x"], i.get("skip"), i["num_groups"]
    weight, bias, scale, shift = (i.get(key) for key in ("weight", "bias", "scale", "shift"))
    eps, silu = i.get("eps", 1e-5), i.get("silu", True)
    out = torch.empty_like(x if skip is None else torch.cat([x, skip], 1))
    reference(x, groups, weight, bias, eps, scale, shift, silu, skip, i.get("stats"), i.get("skip_stats"), out)
    return {"out": out}


def eager(inputs: Inputs) -> Tensor:
    x = torch.cat([inputs["x"], inputs["skip"]], 1) if "skip" in inputs else inputs["x"]
    y = F.group_norm(x, inputs["num_groups"], inputs.get("weight"), inputs.get("bias"), inputs.get("eps", 1e-5))
    if "scale" in inputs:
        y = y * (1 + inputs["scale"][:, :, None, None]) + inputs["shift"][:, :, None, None]
    return F.silu(y) if inputs.get("silu", True) else y


SUITE = Suite(CASES, (torch.float32, torch.bfloat16, torch.float16), group_norm_silu, call, exact, eager)
