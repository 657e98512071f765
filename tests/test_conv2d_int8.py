"""conv2d_int8 beyond the generic matrix: what it refuses, that its sums are exact, and what it costs in quality."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from idm_fast.kernels import extension
from idm_fast.kernels.conv2d_int8 import OP, activation_scale, conv2d_int8, quantise_weight
from idm_fast.ops import ContractError, conv2d, phase_weights, use_backend


def image(*shape: int, seed: int = 0) -> Tensor:
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return noise.contiguous(memory_format=torch.channels_last)


def good() -> dict[str, Any]:
    weight, weight_scale = quantise_weight(image(10, 12, 3, 3))
    return {
        "x": image(2, 8, 6, 4), "weight": weight, "weight_scale": weight_scale,
        "activation": torch.tensor([[0.02, 128.0]]), "bias": torch.zeros(10), "skip": image(2, 4, 6, 4),
        "coefficients": torch.zeros(2, 3, 12), "silu": True, "time_shift": torch.zeros(2, 10),
        "residual": image(2, 10, 6, 4), "out": image(2, 10, 6, 4),
    }  # fmt: skip


PHASES = quantise_weight(phase_weights(image(10, 9, 3, 3)))[0]
REFUSALS = [
    ({"x": image(2, 8, 6, 4)[0]}, "x must be 4-dimensional = [N, C1, H, W], got [8, 6, 4]"),
    ({"x": image(2, 8, 6, 4).contiguous()}, "x must be in torch.channels_last format"),
    ({"x": image(2, 8, 0, 4)}, "x must be of at least one channel and position = C1, H, W >= 1, got [2, 8, 0, 4]"),
    ({"weight": image(10, 12, 3, 3)}, "weight must be of dtype = int8, got float32"),
    ({"weight": torch.ones(10, 12, 3, 3, dtype=torch.int8)}, "weight must be in torch.channels_last format"),
    ({"weight": torch.ones(10, 12, dtype=torch.int8)}, "weight must be 4-dimensional = [Cout, C, k, k], got [10, 12]"),
    ({"weight": quantise_weight(image(10, 8, 3, 3))[0]}, "weight must be [Cout, C, k, k] = [10, 12, 3, 3]"),
    ({"weight": quantise_weight(image(10, 12, 5, 5))[0]}, "weight must be of kernel size = 1 or 3, got 5"),
    ({"stride": 3}, "stride must be allowed for k = 3 = 1 or 2, got 3"),
    ({"upsample": True}, "weight must be the phase weights of phase_weights(weight) = [4, Cout, C, 2, 2], got [10,"),
    ({"upsample": True, "weight": PHASES}, "weight must be [4, Cout, C, 2, 2] = [4, 10, 12, 2, 2]"),
    ({"upsample": True, "stride": 2}, "stride must be 1 with upsample = 1, got 2"),
    ({"weight_scale": torch.ones(9)}, "weight_scale must be [Cout] = [10], got [9]"),
    ({"weight_scale": torch.ones(10).half()}, "weight_scale must be of dtype = float32, got float16"),
    ({"activation": torch.ones(3, 2)}, "activation must be [1, 2] or [N, 2] = [1, 2], got [3, 2]"),
    ({"activation": torch.ones(2)}, "activation must be [1, 2] or [N, 2] = [1, 2], got [2]"),
    ({"activation": torch.tensor([[0.0, 3.0]])}, "activation must be a step above 0 and a whole zero point in 0..255"),
    ({"activation": torch.tensor([[0.1, 3.5]])}, "activation must be a step above 0 and a whole zero point in 0..255"),
    ({"activation": torch.tensor([[0.1, 256.0]])}, "activation must be a step above 0 and a whole zero point"),
    ({"activation": torch.tensor([[float("nan"), 3.0]])}, "activation must be a step above 0 and a whole zero point"),
    ({"skip": image(2, 4, 6, 5)}, "skip must be [N, C, H, W] = [2, 4, 6, 4], got [2, 4, 6, 5]"),
    ({"bias": torch.zeros(9)}, "bias must be [Cout] = [10], got [9]"),
    ({"coefficients": torch.zeros(2, 3, 8)}, "coefficients must be [N, 3, C] = [2, 3, 12], got [2, 3, 8]"),
    ({"coefficients": None}, "silu must be given with coefficients = False without them, got True"),
    ({"time_shift": torch.zeros(2, 20)[:, ::2]}, "time_shift must be dense in its last dimension = stride 1"),
    ({"residual": image(2, 10, 6, 5)}, "residual must be [N, C, H, W] = [2, 10, 6, 4], got [2, 10, 6, 5]"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "message"), REFUSALS)
def test_refuses(change: dict[str, Any], message: str) -> None:
    conv2d_int8(**good())
    arguments = good() | change
    before = arguments["out"].clone()
    with pytest.raises(ContractError, match=re.escape(f"conv2d_int8: {message}")):
        conv2d_int8(**arguments)
    assert torch.equal(arguments["out"], before)


def test_refuses_sums_beyond_int32() -> None:
    weight = torch.zeros(1, 7400, 3, 3, dtype=torch.int8).contiguous(memory_format=torch.channels_last)
    with pytest.raises(ContractError, match=re.escape("k * k * C <= 66000, got 66600")):
        conv2d_int8(image(1, 7400, 1, 1), weight, torch.ones(1), torch.tensor([[0.1, 0.0]]))


def test_refuses_an_output_in_its_input() -> None:
    arguments = good() | {"coefficients": None, "silu": False}
    arguments["out"] = arguments["residual"]
    with pytest.raises(ContractError, match="out must be apart from residual = no overlap, got overlapping memory"):
        conv2d_int8(**arguments)


@pytest.mark.skipif(extension.native is None, reason=str(extension.missing))
def test_largest_sums_are_exact() -> None:
    """Every product is +-255 * 127: the sum passes 2^24 by far, where float32 would lose its last digits."""
    channels = 1024
    x = torch.full((1, channels, 3, 3), 255.0).contiguous(memory_format=torch.channels_last)
    x[:, ::5] = 254.0
    weight = torch.full((3, channels, 3, 3), 127, dtype=torch.int8)
    weight[1], weight[2, ::2] = -127, -126
    weight = weight.contiguous(memory_format=torch.channels_last)
    expected = F.conv2d(x.double(), weight.double(), padding=1).float()
    assert expected.abs().max() > 2**28
    try:
        for isa in extension.native.cpu_isas():
            extension.native.set_cpu_isa(isa)
            with use_backend("cpu"):
                y = conv2d_int8(x, weight, torch.ones(3), torch.tensor([[1.0, 0.0]]))
            assert torch.equal(y, expected), isa
    finally:
        extension.native.set_cpu_isa("")


def layer(c: int, cout: int, size: int) -> dict[str, Tensor]:
    """A convolution behind a group norm whose input is normal, with gamma and beta as trained networks have them."""
    generator = torch.Generator().manual_seed(1)
    noise = [torch.randn(shape, generator=generator) for shape in ((1, c, size, size), (cout, c, 3, 3), (c,), (c,))]
    gamma, beta = 1 + 0.3 * noise[2], 0.3 * noise[3]
    coefficients = torch.stack([torch.zeros(c), gamma, beta])[None]
    nhwc = [value.contiguous(memory_format=torch.channels_last) for value in noise[:2]]
    return {"x": nhwc[0], "weight": nhwc[1], "gamma": gamma, "beta": beta, "coefficients": coefficients}


def test_quality_cost() -> None:
    """Signal to noise against the float32 convolution in dB: bfloat16 has 49 here, 8-bit weights alone 42."""
    at = layer(64, 64, 24)
    exact = conv2d(at["x"], at["weight"], coefficients=at["coefficients"], silu=True).double()
    weight, weight_scale = quantise_weight(at["weight"])
    found = {}
    for sigmas in (2.0, 4.0, 6.0, 8.0):
        activation = activation_scale(at["gamma"], at["beta"], sigmas=sigmas)
        y = conv2d_int8(at["x"], weight, weight_scale, activation, coefficients=at["coefficients"], silu=True)
        found[sigmas] = 10 * torch.log10(exact.square().mean() / (y - exact).square().mean()).item()
    assert found[4.0] > 36.0, found
    assert found[6.0] > 34.0, found
    assert found[2.0] < found[4.0], "a range of two sigmas clamps more than it gains"


def test_activation_scale_covers_what_a_norm_makes() -> None:
    generator = torch.Generator().manual_seed(2)
    gamma, beta = torch.randn(40, generator=generator), torch.randn(40, generator=generator)
    scale, shift = torch.randn(3, 40, generator=generator), torch.randn(3, 40, generator=generator)
    for silu in (False, True):
        rows = activation_scale(gamma, beta, scale, shift, silu=silu, sigmas=3.0)
        v = torch.linspace(-3, 3, 4001)[:, None, None] * (gamma * (1 + scale)) + beta * (1 + scale) + shift
        v = F.silu(v) if silu else v
        low, high = v.amin((0, 2)).clamp_max(0), v.amax((0, 2)).clamp_min(0)
        torch.testing.assert_close(rows[:, 0], (high - low) / 255, rtol=1e-4, atol=0)
        torch.testing.assert_close(rows[:, 1], (-low / rows[:, 0]).round(), rtol=0, atol=0)
    with pytest.raises(ContractError, match="scale and shift must be given together"):
        activation_scale(gamma, beta, scale)


def test_quantise_weight() -> None:
    weight = image(6, 5, 3, 3)
    weight[2] = 0
    steps, scale = quantise_weight(weight)
    assert steps.dtype == torch.int8
    assert steps.is_contiguous(memory_format=torch.channels_last)
    assert steps.abs().amax((1, 2, 3)).tolist() == [127, 127, 0, 127, 127, 127]
    assert ((steps * scale[:, None, None, None] - weight).abs() <= scale[:, None, None, None] * 0.5001).all()
    phases, phase_scale = quantise_weight(phase_weights(weight))
    assert phases.shape == (4, 6, 5, 2, 2)
    assert phase_scale.shape == (4, 6)
    assert phases.permute(0, 1, 3, 4, 2).is_contiguous()


def test_backends_agree_where_nothing_is_rounded() -> None:
    """Whole numbers in, power-of-two scales: every backend gives the same bits."""
    generator = torch.Generator().manual_seed(3)
    x = (
        torch.randint(-100, 100, (2, 9, 7, 5), generator=generator)
        .float()
        .contiguous(memory_format=torch.channels_last)
    )
    weight = torch.randint(-127, 128, (11, 9, 3, 3), generator=generator, dtype=torch.int8)
    weight = weight.contiguous(memory_format=torch.channels_last)
    results = []
    for name in OP.backends:
        if OP.why_not(name, "cpu", torch.float32) is None:
            with use_backend(name):
                results.append(conv2d_int8(x, weight, torch.full((11,), 0.25), torch.tensor([[0.5, 97.0]])))
    assert len(results) >= 2
    assert all(torch.equal(result, results[0]) for result in results[1:])


def test_a_nan_reaches_no_further_than_its_window() -> None:
    """Integers have no NaN, and the backends may differ in what they make of one; everything else is as without it."""
    x = image(2, 4, 6, 5)
    weight, scale = quantise_weight(image(3, 4, 3, 3, seed=1))
    activation = torch.tensor([[0.02, 128.0]])
    spoilt = x.clone(memory_format=torch.preserve_format)
    spoilt[1, 2, 3, 2] = float("nan")
    for backend in OP.backends:
        if OP.why_not(backend, "cpu", torch.float32) is None:
            with use_backend(backend):
                clean, out = (conv2d_int8(v, weight, scale, activation) for v in (x, spoilt))
            out[1, :, 2:5, 1:4] = clean[1, :, 2:5, 1:4]
            assert torch.equal(out, clean), backend
