"""Inputs of norm_coefficients: statistics of real layers and awkward ones, in pieces of any order and size."""

from __future__ import annotations

import torch
from torch import Generator, Tensor

from idm_fast.kernels.case import Case, Inputs, Outputs, Suite, to_float64
from idm_fast.kernels.channel_stats import ChannelStats, combine
from idm_fast.kernels.channel_stats.cases import (
    Fill,
    constant,
    constant_channels,
    far_mean,
    image,
    near_limit,
    outliers,
    shifted,
)
from idm_fast.kernels.norm_coefficients import norm_coefficients
from idm_fast.kernels.norm_coefficients.reference import norm_coefficients as reference


def stats_of(x: Tensor, sizes: list[int]) -> ChannelStats:
    """Statistics in pieces of the given sizes (they are repeated until all positions are taken)."""
    n, c, h, w = x.shape
    cuts: list[int] = []
    while sum(cuts) < h * w:
        cuts.append(min(sizes[len(cuts) % len(sizes)], h * w - sum(cuts)))
    rows = x.double().permute(0, 2, 3, 1).reshape(n, h * w, c)
    partials = [
        torch.stack((r.mean(1), (r - r.mean(1, keepdim=True)).square().sum(1)), 1)
        for r in torch.split(rows, cuts, dim=1)
    ]
    return ChannelStats(torch.stack(partials, 1).float().contiguous(), torch.tensor(cuts, dtype=torch.float32))


def case(
    name: str,
    why: str,
    shape: tuple[int, int, int, int],
    groups: int,
    fill: Fill = shifted,
    *,
    skip: int = 0,  # channels of a second tensor
    sizes: tuple[list[int], list[int]] = ([32], [32]),  # of the pieces of each
    affine: bool = True,
    time: bool = False,
    eps: float = 1e-5,
    layer: bool = False,
) -> Case:
    n, c1, h, w = shape
    c = c1 + skip

    def make(dtype: torch.dtype, generator: Generator) -> Inputs:
        x = image(shape, fill, torch.float32, generator)
        inputs: Inputs = {"stats": stats_of(x, sizes[0]), "num_groups": groups, "eps": eps}
        if skip:
            other = image((n, skip, h, w), fill, torch.float32, generator)
            inputs["skip_stats"] = stats_of(other, sizes[1])
        if affine:
            inputs["weight"] = (1 + 0.3 * torch.randn(c, generator=generator)).to(dtype)
            inputs["bias"] = (0.3 * torch.randn(c, generator=generator)).to(dtype)
        if time:
            projection = (0.3 * torch.randn(n, 2 * c, generator=generator)).to(dtype)
            inputs["scale"], inputs["shift"] = projection.chunk(2, dim=1)
        return inputs

    pieces = -(-h * w // sizes[0][0])
    return Case(name, why, make, lambda dtype: 4 * n * c * (2 * pieces + 3), 10 * n * c * pieces, layer, h * w > 16384)


CASES = [
    case("idm128_64px", "idm-128: first level", (1, 64, 64, 64), 32, time=True, layer=True),
    case("idm128_up", "idm-128: 192 + 128 channels, groups of 10 straddle the seam", (1, 192, 32, 32), 32, skip=128,
         layer=True),
    case("gd256_8px", "gd-256: last level", (1, 512, 8, 8), 32, time=True, layer=True),
    case("gd256_256px", "gd-256: first level", (1, 128, 256, 256), 32, time=True, sizes=([256], []), layer=True),
    case("one_piece", "one piece, one value a group", (1, 13, 1, 1), 13),
    case("instance_norm", "G = C", (2, 10, 9, 4), 10, sizes=([7, 1, 9], [])),
    case("layer_norm", "G = 1, two tensors in one group", (2, 7, 3, 5), 1, skip=9, sizes=([4], [15])),
    case("straddling", "groups of 5 over the seam, pieces unlike each other", (3, 33, 6, 6), 9, skip=12, time=True,
         sizes=([5, 2], [36])),
    case("many_pieces", "more pieces than a block has threads", (1, 6, 24, 25), 3, sizes=([1, 2], [])),
    case("wide_group", "300 channels a group", (1, 600, 2, 2), 2, sizes=([3], [])),
    case("plain", "no parameters", (2, 32, 8, 8), 4, affine=False),
    case("large_eps", "eps 1e-1 is not lost", (1, 32, 4, 4), 8, lambda x: x * 0.1, eps=1e-1),
    case("far_mean", "mean 1000 sigma", (1, 64, 16, 16), 4, far_mean),
    case("constant_channels", "constant channels of different values", (1, 32, 8, 8), 4, constant_channels),
    case("constant", "variance exactly 0", (1, 32, 8, 8), 4, constant),
    case("outliers", "one-hot outliers 3e4 sigma", (2, 48, 8, 8), 4, outliers),
    case("near_limit", "values near the largest of float16", (1, 32, 8, 8), 8, near_limit),
]  # fmt: skip


def outputs(inputs: Inputs, coefficients: Tensor) -> Outputs:
    """What the coefficients do: centre and offset mean something together only."""
    merged = [combine(inputs[key])[0] for key in ("stats", "skip_stats") if key in inputs]
    centre, gain, offset = coefficients.double().unbind(1)
    at_mean = (torch.cat(merged, 1) - centre) * gain + offset
    return {"gain": coefficients[:, 1], "at_mean": at_mean.to(coefficients.dtype)}


def call(inputs: Inputs) -> Outputs:
    parts = [inputs[key].partials for key in ("stats", "skip_stats") if key in inputs]
    shape = (parts[0].shape[0], 3, sum(part.shape[3] for part in parts))
    room = torch.full(shape, float("nan"), device=parts[0].device)
    return outputs(inputs, norm_coefficients(**inputs, out=room))


def exact(inputs: Inputs) -> Outputs:
    i = to_float64(inputs)
    parts = [i[key].partials for key in ("stats", "skip_stats") if key in i]
    room = parts[0].new_empty(parts[0].shape[0], 3, sum(part.shape[3] for part in parts))
    weight, bias, scale, shift = (i.get(key) for key in ("weight", "bias", "scale", "shift"))
    reference(i["stats"], i["num_groups"], weight, bias, i["eps"], scale, shift, i.get("skip_stats"), room)
    return outputs(i, room)


def eager(inputs: Inputs) -> Tensor:
    """The mean and variance of equal pieces in torch's operators, without skip tensor and parameters."""
    partials = inputs["stats"].partials
    n, _, _, c = partials.shape
    groups = inputs["num_groups"]
    if c % groups:
        groups = 1
    mean, m2 = partials[:, :, 0], partials[:, :, 1]
    centre = mean.mean(1).view(n, groups, -1).mean(2, keepdim=True).expand(n, groups, c // groups).reshape(n, 1, c)
    variance = (m2 + (mean - centre).square()).mean(1).view(n, groups, -1).mean(2)
    return torch.rsqrt(variance + inputs["eps"])


SUITE = Suite(CASES, (torch.float32, torch.bfloat16, torch.float16), norm_coefficients, call, exact, eager)
