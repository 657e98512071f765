"""Inputs of conv2d: layers of real networks, and awkward ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from idm_fast.kernels.case import Case, Inputs, Outputs, Suite, element_size, to_float64
from idm_fast.kernels.channel_stats import ChannelStats, combine
from idm_fast.kernels.conv2d import conv2d, phase_weights
from idm_fast.kernels.conv2d.contract import Shape, output_shape
from idm_fast.kernels.conv2d.reference import conv2d as reference

Fill = Callable[[Tensor], Tensor]  # standard normal noise -> values of x
STATS_ROUNDINGS = 8.0  # float32 roundings that the statistics may be off by: long sums in a fixed order


def shifted(noise: Tensor) -> Tensor:
    return noise * 0.5 - 2.3


def far_mean(noise: Tensor) -> Tensor:
    return noise + 1000.0


def outliers(noise: Tensor) -> Tensor:
    x = noise * 1e-2
    x[:, ::3, 0, 0] = 300.0
    return x


def near_limit(noise: Tensor) -> Tensor:
    return 6e4 + noise * 500.0


def case(
    name: str,
    why: str,
    size: tuple[int, int, int],  # N, H, W of x
    channels: tuple[int, int],  # C1, Cout
    *,
    k: int = 3,
    stride: int = 1,
    upsample: bool = False,
    skip: int = 0,  # C2
    norm: bool = False,  # coefficients that centre and scale x
    silu: bool = False,
    shortcut: tuple[int, int] | None = None,  # Cs1, Cs2
    time: bool = False,
    residual: bool = False,
    stats: bool = False,
    bias: bool = True,
    fill: Fill = shifted,
    parameters: torch.dtype | None = None,  # of bias and time shift; None: that of x
    layer: bool = False,
    timed_only: bool = False,
) -> Case:
    n, h, w = size
    c1, cout = channels
    c = c1 + skip
    ho, wo = (2 * h, 2 * w) if upsample else ((h - 1) // stride + 1, (w - 1) // stride + 1)

    def make(dtype: torch.dtype, generator: Generator) -> Inputs:
        def noise(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator)

        def image(values: Tensor) -> Tensor:
            return values.to(dtype).contiguous(memory_format=torch.channels_last)

        weight = image(noise(cout, c, k, k) * (c * k * k) ** -0.5)
        inputs: Inputs = {
            "x": image(fill(noise(n, c1, h, w))),
            "weight": phase_weights(weight) if upsample else weight,
            "stride": stride,
            "upsample": upsample,
            "silu": silu,
            "with_stats": stats,
        }
        if skip:
            inputs["skip"] = image(fill(noise(n, skip, h, w)))
        if norm:
            values = inputs["x"] if not skip else torch.cat([inputs["x"], inputs["skip"]], 1)
            centre = values.double().mean((2, 3)).float()
            spread = values.double().std((2, 3), correction=0).float().clamp_min(1e-3)
            gain = (1 + 0.3 * noise(n, c)) / spread
            inputs["coefficients"] = torch.stack([centre, gain, 0.3 * noise(n, c)], 1)
        if bias:
            inputs["bias"] = noise(cout).to(parameters or dtype)
        if shortcut:
            inputs["shortcut"] = image(noise(n, shortcut[0], ho, wo))
            if shortcut[1]:
                inputs["shortcut_skip"] = image(noise(n, shortcut[1], ho, wo))
            inputs["shortcut_weight"] = (noise(cout, sum(shortcut)) * sum(shortcut) ** -0.5).to(dtype)
        if time:  # a slice of one projection of all blocks, as the networks have it
            inputs["time_shift"] = noise(n, 3 * cout).to(parameters or dtype)[:, cout : 2 * cout]
        if residual:
            inputs["residual"] = image(noise(n, cout, ho, wo))
        return inputs

    read = n * h * w * c + cout * c * (16 if upsample else k * k)
    written = n * ho * wo * cout
    extra = n * ho * wo * sum(shortcut) if shortcut else 0
    moved = read + written + extra + written * residual
    flops = 2 * written * c * (4 if upsample else k * k) + 2 * extra * cout
    return Case(name, why, make, lambda dtype: moved * element_size(dtype), flops, layer, timed_only)


FUSED: dict[str, Any] = {"norm": True, "silu": True, "stats": True}
LAYERS = [
    case("idm128_stem", "idm-128: first convolution", (1, 64, 64), (24, 64), stats=True, layer=True),
    case("idm128_64px", "idm-128: block at 64 px", (1, 64, 64), (64, 64), **FUSED, time=True, layer=True),
    case("idm128_down", "idm-128: 64 px to 32 px", (1, 64, 64), (64, 64), stride=2, stats=True, layer=True),
    case("idm128_16px", "idm-128: block at 16 px", (1, 16, 16), (192, 192), **FUSED, residual=True, layer=True),
    case("idm128_seam", "idm-128: first convolution of a block after a concat", (1, 32, 32), (128, 128), skip=128,
         **FUSED, layer=True),
    case("idm128_shortcut", "idm-128: second convolution of the same block", (1, 32, 32), (128, 128), **FUSED,
         shortcut=(128, 128), layer=True),
    case("idm128_up", "idm-128: 32 px to 64 px", (1, 32, 32), (128, 128), upsample=True, stats=True, layer=True),
    case("idm128_out", "idm-128: last convolution", (1, 64, 64), (64, 12), norm=True, silu=True, layer=True),
    case("sr3_128px", "sr3-128: block at 128 px", (1, 128, 128), (64, 64), **FUSED, time=True,
         layer=True, timed_only=True),
    case("sr3_16px", "sr3-128: block at 16 px", (1, 16, 16), (512, 512), **FUSED, time=True,
         layer=True, timed_only=True),
    case("sr3_8px_seam", "sr3-128: 8 px, weights alone are 9 MB", (1, 8, 8), (512, 512), skip=512, **FUSED,
         layer=True, timed_only=True),
    case("sr3_qkv", "sr3-128: projection before the attention at 16 px", (1, 16, 16), (512, 1536), k=1, norm=True,
         bias=False, layer=True, timed_only=True),
    case("sr3_up", "sr3-128: 64 px to 128 px", (1, 64, 64), (128, 128), upsample=True, stats=True, layer=True,
         timed_only=True),
    case("gd256_256px", "gd-256: block at 256 px", (1, 256, 256), (128, 128), **FUSED, layer=True, timed_only=True),
    case("gd256_64px", "gd-256: block at 64 px", (1, 64, 64), (256, 256), **FUSED, layer=True, timed_only=True),
    case("gd256_16px_shortcut", "gd-256: 16 px, shortcut of a concat", (1, 16, 16), (512, 512), **FUSED,
         shortcut=(512, 512), layer=True, timed_only=True),
    case("difface_512px", "difface-512: block at 512 px", (1, 512, 512), (32, 32), **FUSED,
         layer=True, timed_only=True),
    case("difface_out", "difface-512: last convolution, 6 channels", (1, 512, 512), (32, 6), norm=True, silu=True,
         layer=True, timed_only=True),
    case("difface_8px", "difface-512: block at 8 px", (1, 8, 8), (512, 512), **FUSED, layer=True, timed_only=True),
]  # fmt: skip

AWKWARD = [
    case("plain", "nothing but the convolution", (1, 8, 8), (16, 16), bias=False),
    case("one_pixel", "a 1 x 1 image: eight of nine taps are padding", (2, 1, 1), (24, 16), norm=True, silu=True),
    case("odd", "no size is a multiple of anything", (2, 7, 5), (21, 13), **FUSED, residual=True, time=True),
    case("picture", "C = 3 in, 6 out", (1, 9, 11), (3, 6), stats=True),
    case("stem_like", "6 in, 3 out", (2, 6, 10), (6, 3)),
    case("wide_row", "one row longer than a tile", (1, 1, 150), (8, 8), stats=True),
    case("tall_column", "one column longer than a tile", (1, 150, 1), (8, 8), norm=True),
    case("pointwise", "1x1 with a norm, no SiLU", (2, 5, 6), (24, 40), k=1, norm=True),
    case("pointwise_all", "1x1 with everything", (2, 5, 3), (10, 9), k=1, skip=6, shortcut=(4, 3), residual=True,
         time=True, **FUSED),
    case("stride", "stride 2, even size", (1, 8, 12), (16, 24), stride=2),
    case("stride_odd", "stride 2, odd size, everything", (2, 9, 7), (12, 10), stride=2, skip=5, shortcut=(7, 4),
         residual=True, time=True, **FUSED),
    case("upsample", "four phases", (1, 6, 6), (16, 16), upsample=True),
    case("upsample_one_pixel", "1 x 1 becomes 2 x 2", (1, 1, 1), (8, 8), upsample=True, stats=True),
    case("upsample_all", "four phases with everything", (2, 5, 3), (9, 11), upsample=True, skip=4, shortcut=(3, 5),
         residual=True, time=True, **FUSED),
    case("skip", "virtual concat alone", (1, 6, 7), (16, 16), skip=16),
    case("seam", "the seam lies inside a vector", (1, 6, 7), (13, 16), skip=22, norm=True, silu=True),
    case("norm", "a prologue without SiLU", (1, 7, 7), (16, 16), norm=True),
    case("silu", "a prologue with SiLU: a border is 0, not silu(offset)", (1, 3, 3), (16, 16), norm=True, silu=True),
    case("shortcut", "a shortcut alone", (1, 6, 6), (16, 16), shortcut=(24, 0)),
    case("shortcut_skip", "a shortcut of a virtual concat", (1, 6, 6), (16, 16), shortcut=(8, 16)),
    case("time", "a time shift alone", (3, 4, 4), (16, 16), time=True, bias=False),
    case("residual", "a residual alone", (1, 6, 6), (16, 16), residual=True),
    case("stats", "statistics alone", (3, 9, 9), (16, 20), stats=True),
    case("float_parameters", "float32 bias and time shift", (2, 6, 6), (16, 16), time=True, parameters=torch.float32),
    case("all_at_once", "every option of a block", (2, 8, 8), (32, 32), skip=16, shortcut=(16, 16), residual=True,
         time=True, **FUSED),
    case("long_sum", "a K that is split over programs", (1, 4, 4), (320, 16), **FUSED),
    case("far_mean", "mean 1000 sigma into the prologue", (1, 8, 8), (32, 16), norm=True, silu=True, fill=far_mean),
    case("far_stats", "a result with mean 1000 sigma", (1, 12, 12), (16, 16), fill=far_mean, stats=True),
    case("outliers", "one-hot outliers 3e4 sigma", (1, 8, 8), (24, 16), **FUSED, fill=outliers),
    case("near_limit", "values near the largest of float16", (1, 6, 6), (16, 16), **FUSED, fill=near_limit),
]  # fmt: skip

CASES = LAYERS + AWKWARD


def shape_of(inputs: Inputs) -> Shape:
    return output_shape(inputs["x"], inputs["weight"], inputs["stride"], inputs["upsample"])


def call(inputs: Inputs) -> Outputs:
    x = inputs["x"]
    shape = shape_of(inputs)
    out = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last).fill_(float("nan"))
    if not inputs["with_stats"]:
        return {"out": conv2d(**inputs, out=out)}
    result, stats = conv2d(**inputs, out=out)
    return {"out": result, "stats": stats_error(result, stats)}


def stats_error(out: Tensor, stats: ChannelStats) -> Tensor:
    """[2, N, C]: how far mean and M2 are from those of ``out``, relative, as a fraction of what rounding explains."""
    mean, m2 = combine(stats)
    positions = stats.counts.sum()
    stored = out.double()
    assert positions == out.shape[2] * out.shape[3], "the counts must add up to the positions"
    true_mean = stored.mean((2, 3))
    true_m2 = (stored - true_mean[:, :, None, None]).square().sum((2, 3))
    spread = (true_m2 / positions).sqrt()
    eps = torch.finfo(torch.float32).eps
    scale = true_mean.abs() + spread + torch.finfo(torch.float32).tiny
    # A float32 mean of a piece is off by eps * scale, and the sum of squares by twice that times the spread.
    squares = positions * scale * (spread + scale * eps)
    errors = torch.stack([(mean - true_mean) / scale, (m2 - true_m2) / squares])
    return (errors / STATS_ROUNDINGS).float()


def exact(inputs: Inputs) -> Outputs:
    i = to_float64(inputs)
    out = reference(
        i["x"], i["weight"], i.get("bias"), i["stride"], i["upsample"], i.get("skip"), i.get("coefficients"),
        i["silu"], i.get("shortcut"), i.get("shortcut_skip"), i.get("shortcut_weight"), i.get("time_shift"),
        i.get("residual"), False, None, None,
    )  # fmt: skip
    assert isinstance(out, Tensor)
    n, c = out.shape[:2]
    return {"out": out} | ({"stats": out.new_zeros((2, n, c))} if i["with_stats"] else {})


def eager(inputs: Inputs) -> Tensor:
    """What one writes without this package; the norm as its apply step only, the upsample in full."""
    x, weight, bias = inputs["x"], inputs["weight"], inputs.get("bias")
    h = torch.cat([x, inputs["skip"]], 1) if "skip" in inputs else x
    if "coefficients" in inputs:
        centre, gain, offset = inputs["coefficients"].to(x.dtype)[:, :, :, None, None].unbind(1)
        h = (h - centre) * gain + offset
        h = F.silu(h) if inputs["silu"] else h
    if inputs["upsample"]:
        h, weight = F.interpolate(h, scale_factor=2.0, mode="nearest"), _unphased(weight)
    y = F.conv2d(h, weight, None if bias is None else bias.to(x.dtype), inputs["stride"], weight.shape[-1] // 2)
    if "shortcut" in inputs:
        raw = [inputs[name] for name in ("shortcut", "shortcut_skip") if name in inputs]
        y = y + F.conv2d(torch.cat(raw, 1), inputs["shortcut_weight"][:, :, None, None])
    if "time_shift" in inputs:
        y = y + inputs["time_shift"].to(x.dtype)[:, :, None, None]
    return y + inputs["residual"] if "residual" in inputs else y


def _unphased(weight: Tensor) -> Tensor:
    """A 3x3 kernel of the phases' shape: what it computes does not matter where only time is measured."""
    _, cout, c, _, _ = weight.shape
    return weight.new_zeros((cout, c, 3, 3)).contiguous(memory_format=torch.channels_last)


SUITE = Suite(CASES, (torch.float32, torch.bfloat16, torch.float16), conv2d, call, exact, eager)
