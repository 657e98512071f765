"""Inputs of the quantised convolutions: layers of real networks, and awkward ones. ``quantised_suite`` makes them for
integers here and for 8-bit floats in conv2d_fp8.

No activation lies near the middle between two quantised values (``off_ties``), so that every correct backend quantises
alike and is judged on its sums: exact ones for integers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Generator, Tensor

from idm_fast.kernels.case import Case, Inputs, Outputs, Suite, element_size, to_float64
from idm_fast.kernels.conv2d import phase_weights
from idm_fast.kernels.conv2d.cases import eager as conv2d_eager
from idm_fast.kernels.conv2d.cases import far_mean, outliers, shape_of, shifted, stats_error
from idm_fast.kernels.conv2d_int8 import activation_scale, conv2d_int8, quantise_weight
from idm_fast.kernels.conv2d_int8.reference import conv2d_int8 as reference
from idm_fast.kernels.conv2d_int8.reference import prologue

MARGIN = 0.06  # of the distance between two quantised values


@dataclass(frozen=True)
class Quantised:
    """A quantised convolution and its numbers."""

    function: Callable[..., Any]
    reference: Callable[..., Any]
    quantise_weight: Callable[[Tensor], tuple[Tensor, Tensor]]
    activation_scale: Callable[..., Tensor]
    range_of: Callable[[Tensor], Tensor]  # x -> the activation row that holds all of it, where no norm says it
    spacings: Callable[[Tensor, Tensor], Tensor]  # (a, activation) -> a counted in distances between its neighbours
    sigmas: float


def case(
    q: Quantised,
    name: str,
    why: str,
    size: tuple[int, int, int],  # N, H, W of x
    channels: tuple[int, int],  # C1, Cout
    *,
    k: int = 3,
    stride: int = 1,
    upsample: bool = False,
    skip: int = 0,  # C2
    norm: bool = False,
    silu: bool = False,
    time: bool = False,
    residual: bool = False,
    stats: bool = False,
    bias: bool = True,
    fill: Any = shifted,
    sigmas: float | None = None,  # None: those of q
    per_sample: bool = False,
    parameters: torch.dtype | None = None,
    layer: bool = False,
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

        floats = noise(cout, c, k, k) * (c * k * k) ** -0.5
        weight, weight_scale = q.quantise_weight(phase_weights(floats) if upsample else floats)
        x = image(fill(noise(n, c1, h, w)))
        inputs: Inputs = {"x": x, "weight": weight, "weight_scale": weight_scale, "stride": stride}
        inputs |= {"upsample": upsample, "silu": silu, "with_stats": stats}
        if skip:
            inputs["skip"] = image(fill(noise(n, skip, h, w)))
        if norm:
            values = x if not skip else torch.cat([x, inputs["skip"]], 1)
            spread = values.double().std((2, 3), correction=0).float().clamp_min(1e-3)
            gamma, beta, scale = 1 + 0.3 * noise(c), 0.3 * noise(c), 0.3 * noise(n, c)
            times = (scale, 0.3 * noise(n, c)) if per_sample else (None, None)
            inputs["activation"] = q.activation_scale(gamma, beta, *times, silu=silu, sigmas=sigmas or q.sigmas)
            gain = gamma.expand(n, c) * (1 + times[0] if times[0] is not None else 1) / spread
            offset = beta.expand(n, c) * (1 + times[0] if times[0] is not None else 1)
            offset = offset if times[1] is None else offset + times[1]
            inputs["coefficients"] = torch.stack([values.double().mean((2, 3)).float(), gain, offset], 1)
        else:
            inputs["activation"] = q.range_of(x)
        if bias:
            inputs["bias"] = noise(cout).to(parameters or dtype)
        if time:
            inputs["time_shift"] = noise(n, 3 * cout).to(parameters or dtype)[:, cout : 2 * cout]
        if residual:
            inputs["residual"] = image(noise(n, cout, ho, wo))
        return off_ties(q, inputs, generator)

    written = n * ho * wo * cout
    moved = n * h * w * c + written * (1 + residual)
    weights = cout * c * (16 if upsample else k * k)  # bytes
    flops = 2 * written * c * (4 if upsample else k * k)
    return Case(name, why, make, lambda dtype: moved * element_size(dtype) + weights, flops, layer)


def off_ties(q: Quantised, inputs: Inputs, generator: Generator) -> Inputs:
    """Moves every value of x and skip whose activation lies near a tie, until none does."""
    for _ in range(60):
        images = [inputs[name] for name in ("x", "skip") if name in inputs]
        wide = to_float64(inputs)
        a = prologue(wide["x"], wide.get("skip"), wide.get("coefficients"), inputs["silu"])
        v = q.spacings(a, inputs["activation"].double())
        tie = (v - v.floor() - 0.5).abs() < MARGIN
        near = torch.split(tie, [image.shape[1] for image in images], 1)
        if not any(mask.any() for mask in near):
            return inputs
        for image, mask in zip(images, near, strict=True):
            values = image[mask].double()
            reach = 0.2 * image.double().std(correction=0) + values.abs() * torch.finfo(image.dtype).eps
            moved = values + reach * torch.randn(values.shape, generator=generator, dtype=torch.float64)
            image[mask] = moved.to(image.dtype)
    raise AssertionError("some activations cannot be moved off the ties")


FUSED: dict[str, Any] = {"norm": True, "silu": True, "stats": True}


def cases(q: Quantised) -> list[Case]:
    make = partial(case, q)
    return [
        make("idm128_64px", "idm-128: block at 64 px", (1, 64, 64), (64, 64), **FUSED, residual=True, layer=True),
        make("idm128_16px", "idm-128: block at 16 px", (1, 16, 16), (192, 192), **FUSED, residual=True, layer=True),
        make("idm128_seam", "idm-128: first convolution after a concat", (1, 32, 32), (128, 128), skip=128, **FUSED,
             layer=True),
        make("idm128_up", "idm-128: 32 px to 64 px", (1, 32, 32), (128, 128), upsample=True, stats=True, layer=True),
        make("plain", "nothing but the convolution", (1, 8, 8), (16, 16), bias=False),
        make("one_pixel", "a 1 x 1 image: eight of nine taps are padding", (2, 1, 1), (24, 16), fill=lambda x: x),
        make("odd", "no size is a multiple of anything", (2, 7, 5), (21, 13), **FUSED, residual=True, time=True),
        make("picture", "C = 3 in, 6 out", (1, 9, 11), (3, 6), stats=True),
        make("wide_row", "one row longer than a tile", (1, 1, 150), (8, 8), stats=True),
        make("pointwise", "1x1 with a norm, no SiLU", (2, 5, 6), (24, 40), k=1, norm=True),
        make("stride_odd", "stride 2, odd size", (2, 9, 7), (12, 10), stride=2, skip=5, residual=True, time=True,
             **FUSED),
        make("upsample_all", "four phases with everything", (2, 5, 3), (9, 11), upsample=True, skip=4, residual=True,
             time=True, **FUSED),
        make("seam", "the seam lies inside a vector", (1, 6, 7), (13, 16), skip=22, norm=True, silu=True),
        make("per_sample", "every sample its own activation row", (3, 6, 6), (16, 20), **FUSED, per_sample=True),
        make("float_parameters", "float32 bias and time shift", (2, 6, 6), (16, 16), time=True,
             parameters=torch.float32),
        make("clamped", "one sigma: much lies outside the range", (1, 8, 8), (32, 16), **FUSED, sigmas=1.0),
        make("long_sum", "a long K", (1, 4, 4), (320, 16), **FUSED),
        make("far_mean", "mean 1000 sigma into the prologue", (1, 8, 8), (32, 16), norm=True, silu=True, fill=far_mean),
        make("outliers", "one-hot outliers 3e4 sigma", (1, 8, 8), (24, 16), **FUSED, fill=outliers),
    ]  # fmt: skip


def call(q: Quantised, inputs: Inputs) -> Outputs:
    x = inputs["x"]
    out = torch.empty(shape_of(inputs), dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    out.fill_(float("nan"))
    if not inputs["with_stats"]:
        return {"out": q.function(**inputs, out=out)}
    result, stats = q.function(**inputs, out=out)
    return {"out": result, "stats": stats_error(result, stats)}


def exact(q: Quantised, inputs: Inputs) -> Outputs:
    i = to_float64(inputs)
    out = q.reference(
        i["x"], i["weight"], i["weight_scale"], i["activation"], i.get("bias"), i["stride"], i["upsample"],
        i.get("skip"), i.get("coefficients"), i["silu"], i.get("time_shift"), i.get("residual"), False, None, None,
    )  # fmt: skip
    assert isinstance(out, Tensor)
    n, c = out.shape[:2]
    return {"out": out} | ({"stats": out.new_zeros((2, n, c))} if i["with_stats"] else {})


def eager(inputs: Inputs) -> Tensor:
    """The convolution in x's dtype that this one replaces."""
    scale = inputs["weight_scale"][..., None, None, None]
    weight = (inputs["weight"].float() * scale).to(inputs["x"].dtype)
    return conv2d_eager({**inputs, "weight": weight})


def quantised_suite(q: Quantised) -> Suite:
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    return Suite(cases(q), dtypes, q.function, partial(call, q), partial(exact, q), eager)


def range_of(x: Tensor) -> Tensor:
    """(step, zero point) of 256 steps over x and 0."""
    low, high = min(x.min().item(), 0.0), max(x.max().item(), 0.0)
    step = (high - low) / 255
    return torch.tensor([[step, round(-low / step)]], dtype=torch.float32)


def spacings(a: Tensor, activation: Tensor) -> Tensor:
    step, zero = activation[:, :, None, None, None].unbind(1)
    return (a / step + zero).clamp(-0.6, 255.6)


SUITE = quantised_suite(
    Quantised(conv2d_int8, reference, quantise_weight, activation_scale, range_of, spacings, sigmas=4.0)
)
