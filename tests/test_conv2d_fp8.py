"""conv2d_fp8 beyond the generic matrix: what it refuses, its scales, and what it costs in quality."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor

from idm_fast.kernels.conv2d_fp8 import OP, activation_scale, conv2d_fp8, quantise_weight
from idm_fast.kernels.conv2d_fp8.quantise import LARGEST, to_e4m3
from idm_fast.kernels.conv2d_fp8.torch_backend import _pointwise
from idm_fast.ops import ContractError, conv2d, phase_weights, use_backend


def image(*shape: int, seed: int = 0) -> Tensor:
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return noise.contiguous(memory_format=torch.channels_last)


def good() -> dict[str, Any]:
    weight, weight_scale = quantise_weight(image(10, 8, 3, 3))
    return {
        "x": image(2, 8, 6, 4), "weight": weight, "weight_scale": weight_scale, "activation": torch.tensor([[0.02]]),
        "coefficients": torch.zeros(2, 3, 8), "silu": True, "out": image(2, 10, 6, 4),
    }  # fmt: skip


REFUSALS = [
    ({"x": image(2, 8, 6, 4)[0]}, "x must be 4-dimensional = [N, C1, H, W], got [8, 6, 4]"),
    ({"weight": image(10, 8, 3, 3)}, "weight must be of dtype = float8_e4m3fn, got float32"),
    ({"weight": quantise_weight(image(10, 9, 3, 3))[0]}, "weight must be [Cout, C, k, k] = [10, 8, 3, 3]"),
    ({"weight_scale": torch.ones(9)}, "weight_scale must be [Cout] = [10], got [9]"),
    ({"activation": torch.ones(1, 2)}, "activation must be [1, 1] or [N, 1] = [1, 1], got [1, 2]"),
    ({"activation": torch.zeros(1, 1)}, "activation must be a finite factor = above 0, got 0.0"),
    ({"activation": torch.full((1, 1), torch.inf)}, "activation must be a finite factor = above 0, got inf"),
    ({"coefficients": None}, "silu must be given with coefficients = False without them, got True"),
    ({"stride": 3}, "stride must be allowed for k = 3 = 1 or 2, got 3"),
]


@pytest.mark.parametrize(("change", "message"), REFUSALS)
def test_refuses(change: dict[str, Any], message: str) -> None:
    conv2d_fp8(**good())
    arguments = good() | change
    before = arguments["out"].clone()
    with pytest.raises(ContractError, match=re.escape(f"conv2d_fp8: {message}")):
        conv2d_fp8(**arguments)
    assert torch.equal(arguments["out"], before)


def test_conversion_saturates() -> None:
    values = torch.tensor([449.0, 1e30, torch.inf, -500.0, 432.1, 2.0**-10, 1.0625, 1.1875])
    assert to_e4m3(values).tolist() == [448.0, 448.0, 448.0, -448.0, 448.0, 0.0, 1.0, 1.25]


def test_scales() -> None:
    weight = image(6, 5, 3, 3)
    weight[2] = 0
    steps, scale = quantise_weight(weight)
    assert steps.is_contiguous(memory_format=torch.channels_last)
    assert steps.float().abs().amax((1, 2, 3)).tolist() == [LARGEST, LARGEST, 0, LARGEST, LARGEST, LARGEST]
    back = steps.float() * scale[:, None, None, None]
    assert ((back - weight).abs() <= weight.abs() / 16 + scale[:, None, None, None] * 2**-9).all()
    phases, phase_scale = quantise_weight(phase_weights(weight))
    assert phases.permute(0, 1, 3, 4, 2).is_contiguous()
    assert phase_scale.shape == (4, 6)
    gamma, beta, shift = torch.ones(4), torch.zeros(4), torch.tensor([[0.0] * 4, [3.0] * 4])
    plain = activation_scale(gamma, beta, torch.zeros(2, 4), shift, silu=False, sigmas=2.0)
    torch.testing.assert_close(plain, torch.tensor([[2.0], [5.0]]) / LARGEST)


def test_scaled_mm_is_the_product() -> None:
    """The branch for e4m3 units, on the CPU, where torch has the same operator: exact products, float32 sums."""
    q, weight = to_e4m3(image(2, 32, 5, 3)), quantise_weight(image(48, 32, 1, 1))[0]
    y = _pointwise(q, weight)
    exact = torch.nn.functional.conv2d(q.double(), weight.double())
    torch.testing.assert_close(y.double(), exact, rtol=1e-6, atol=1e-6 * exact.abs().max().item())
    assert y.is_contiguous(memory_format=torch.channels_last)


def test_quality_cost() -> None:
    """Signal to noise against the float32 convolution in dB: three bits of precision have 30 or so, 8-bit integers 35,
    bfloat16 49. It hardly depends on the range."""
    generator = torch.Generator().manual_seed(1)
    noise = [torch.randn(shape, generator=generator) for shape in ((1, 64, 24, 24), (64, 64, 3, 3), (64,), (64,))]
    x, floats = (value.contiguous(memory_format=torch.channels_last) for value in noise[:2])
    gamma, beta = 1 + 0.3 * noise[2], 0.3 * noise[3]
    coefficients = torch.stack([torch.zeros(64), gamma, beta])[None]
    exact = conv2d(x, floats, coefficients=coefficients, silu=True).double()
    weight, weight_scale = quantise_weight(floats)
    found = {}
    for sigmas in (4.0, 8.0, 32.0):
        activation = activation_scale(gamma, beta, sigmas=sigmas)
        y = conv2d_fp8(x, weight, weight_scale, activation, coefficients=coefficients, silu=True)
        found[sigmas] = 10 * torch.log10(exact.square().mean() / (y - exact).square().mean()).item()
    assert min(found.values()) > 27.0, found
    assert max(found.values()) - min(found.values()) < 2.0, found


@pytest.mark.parametrize("backend", [name for name in OP.backends if OP.why_not(name, "cpu", torch.float32) is None])
def test_every_backend_rounds_to_nearest(backend: str) -> None:
    """An identity of 1x1 shows each quantised value: all e4m3 numbers, what lies between them, and beyond."""
    numbers = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    numbers = numbers[numbers.isfinite()].sort().values
    middles = (numbers[1:] + numbers[:-1]) / 2
    values = torch.cat([numbers, middles, middles * 1.001, middles * 0.999, torch.tensor([460.0, -1e30, 3e38])])
    x = values[None, None, None].contiguous(memory_format=torch.channels_last)
    with use_backend(backend):
        found = conv2d_fp8(x, torch.ones(1, 1, 1, 1).to(torch.float8_e4m3fn), torch.ones(1), torch.ones(1, 1))
    assert torch.equal(found.flatten(), to_e4m3(values).float())


def test_a_nan_stays_a_nan() -> None:
    x = image(1, 4, 5, 5)
    x[0, 1, 2, 2] = float("nan")
    weight, scale = quantise_weight(image(3, 4, 3, 3, seed=1))
    for backend in OP.backends:
        if OP.why_not(backend, "cpu", torch.float32) is None:
            with use_backend(backend):
                out = conv2d_fp8(x, weight, scale, torch.full((1, 1), 0.02))
            assert out.isnan().sum() == 27, backend
