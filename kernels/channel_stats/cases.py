"""Inputs of channel_stats: layers of real networks, and awkward ones. The fills serve every operation on statistics."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Generator, Tensor

from idm_fast.kernels.case import Case, Inputs, Outputs, Suite, element_size
from idm_fast.kernels.channel_stats import ChannelStats, channel_stats, combine, empty_stats
from idm_fast.kernels.channel_stats.reference import channel_stats as reference

Fill = Callable[[Tensor], Tensor]  # standard normal noise [N, C, H, W] -> values


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


def late_outlier(noise: Tensor) -> Tensor:
    x = noise * 1e-2
    x[:, :, -1, -1] = 300.0
    return x


def near_limit(noise: Tensor) -> Tensor:
    return 6e4 + noise * 500.0


def image(shape: tuple[int, int, int, int], fill: Fill, dtype: torch.dtype, generator: Generator) -> Tensor:
    """[N, C, H, W] channels_last."""
    return fill(torch.randn(shape, generator=generator)).to(dtype).contiguous(memory_format=torch.channels_last)


def case(name: str, why: str, shape: tuple[int, int, int, int], fill: Fill = shifted, *, layer: bool = False) -> Case:
    n, c, h, w = shape

    def make(dtype: torch.dtype, generator: Generator) -> Inputs:
        return {"x": image(shape, fill, dtype, generator)}

    elements = n * c * h * w
    timed_only = elements > 300_000
    return Case(name, why, make, lambda dtype: elements * element_size(dtype), 3 * elements, layer, timed_only)


CASES = [
    case("idm128_64px", "idm-128: first level", (1, 64, 64, 64), layer=True),
    case("idm128_16px", "idm-128: third level", (1, 192, 16, 16), layer=True),
    case("sr3_128px", "sr3-128: first level", (1, 64, 128, 128), layer=True),
    case("sr3_8px", "sr3-128: last level", (1, 512, 8, 8), layer=True),
    case("gd256_256px", "gd-256: first level", (1, 128, 256, 256), layer=True),
    case("difface_512px", "difface-512: first level", (1, 32, 512, 512), layer=True),
    case("one_pixel", "1 x 1 positions: M2 is 0", (3, 21, 1, 1)),
    case("one_channel", "a single channel", (2, 1, 13, 5)),
    case("odd", "odd sizes, C no multiple of any vector", (2, 21, 7, 5)),
    case("uneven", "a last piece of one row", (1, 24, 3, 43)),
    case("wide", "more channels than a block is wide", (1, 600, 3, 3)),
    case("many_pieces", "pieces of more than 64 rows", (1, 2, 95, 97)),
    case("far_mean", "mean 1000 sigma: E[x^2] - E[x]^2 would fail", (1, 64, 16, 16), far_mean),
    case("constant_channels", "M2 exactly 0", (1, 32, 8, 8), constant_channels),
    case("outliers", "one-hot outliers 3e4 sigma in the first row", (2, 48, 8, 8), outliers),
    case("late_outlier", "an outlier in the last row", (2, 48, 8, 8), late_outlier),
    case("near_limit", "values near the largest of float16", (1, 32, 8, 8), near_limit),
]


def outputs(x: Tensor, stats: ChannelStats) -> Outputs:
    """Each piece, and all together. The largest |x| and squared deviation ride along: sums round in units of those."""
    work = stats.partials.dtype
    mean, m2 = combine(stats)
    count = stats.counts.double().sum()
    largest = x.double().abs().max().reshape(1)
    deviation = (x.double() - x.double().mean((2, 3), keepdim=True)).square().max().reshape(1)
    values = {
        "mean": torch.cat([mean.flatten(), largest]),
        "variance": torch.cat([(m2 / count).flatten(), deviation]),
        "piece_mean": torch.cat([stats.partials[:, :, 0].double().flatten(), largest]),
        # M2 itself would grow with the piece.
        "piece_variance": torch.cat([(stats.partials[:, :, 1] / stats.counts[:, None]).double().flatten(), deviation]),
        "counts": stats.counts,
    }
    return {key: value.to(work) for key, value in values.items()}


def call(inputs: Inputs) -> Outputs:
    x = inputs["x"]
    room = ChannelStats(*(tensor.fill_(float("nan")) for tensor in empty_stats(x)))
    return outputs(x, channel_stats(x, out=room))


def exact(inputs: Inputs) -> Outputs:
    x = inputs["x"].double()
    room = empty_stats(x)
    reference(x, room)
    return outputs(x, room)


def eager(inputs: Inputs) -> tuple[Tensor, Tensor]:
    return torch.var_mean(inputs["x"], dim=(2, 3), correction=0)


SUITE = Suite(CASES, (torch.float32, torch.bfloat16, torch.float16), channel_stats, call, exact, eager)
