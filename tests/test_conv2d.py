"""conv2d beyond the generic matrix: what it refuses, and what it must be equal to."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from idm_fast.kernels.conv2d import OP, conv2d, phase_weights
from idm_fast.kernels.conv2d.cases import AWKWARD, call, stats_error
from idm_fast.ops import BackendError, ContractError, use_backend

HERE = [name for name, row in OP.backends.items() if "cpu" in row.devices and name != "triton"]
INTERPRETED = HERE + ["triton"] * (OP.why_not("triton", "cpu", torch.float32) is None)


def image(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return noise.to(dtype).contiguous(memory_format=torch.channels_last)


def good() -> dict[str, Any]:
    """A call with every option, which each refusal below spoils in one place."""
    return {
        "x": image(2, 8, 6, 4), "weight": image(10, 12, 3, 3), "bias": torch.zeros(10), "skip": image(2, 4, 6, 4),
        "coefficients": torch.zeros(2, 3, 12), "silu": True, "shortcut": image(2, 3, 6, 4),
        "shortcut_skip": image(2, 2, 6, 4), "shortcut_weight": torch.zeros(10, 5), "time_shift": torch.zeros(2, 10),
        "residual": image(2, 10, 6, 4), "with_stats": True, "out": image(2, 10, 6, 4),
    }  # fmt: skip


NCHW = torch.randn(2, 8, 6, 4)
REFUSALS = [
    ({"x": image(2, 8, 6, 4)[0]}, "x must be 4-dimensional = [N, C1, H, W], got [8, 6, 4]"),
    ({"x": torch.ones(2, 8, 6, 4, dtype=torch.int32)}, "x must be of a float dtype = float32, bfloat16"),
    ({"x": NCHW}, "x must be in torch.channels_last format = strides [192, 1, 32, 8], got strides [192, 24, 4, 1]"),
    ({"x": image(2, 8, 0, 4)}, "x must be of at least one channel and position = C1, H, W >= 1, got [2, 8, 0, 4]"),
    ({"skip": image(2, 4, 6, 5)}, "skip must be [N, C, H, W] = [2, 4, 6, 4], got [2, 4, 6, 5]"),
    ({"skip": image(2, 0, 6, 4)}, "skip must be 4-dimensional with channels = [2, 'C', 6, 4], got [2, 0, 6, 4]"),
    ({"skip": image(2, 4, 6, 4).half()}, "skip must be of dtype = float32, got float16"),
    ({"skip": NCHW[:, :4]}, "skip must be in torch.channels_last format"),
    ({"skip": torch.ones(2, 4, 6, 4, device="meta")}, "skip must be on the device of the first tensor = cpu, got meta"),
    ({"weight": image(10, 12, 3, 3).half()}, "weight must be of dtype = float32, got float16"),
    ({"weight": torch.ones(10, 12, 3, 3, device="meta")}, "weight must be on the device of the first tensor = cpu"),
    ({"weight": torch.ones(10, 12, 3)}, "weight must be 4-dimensional = [Cout, C, k, k], got [10, 12, 3]"),
    ({"weight": image(10, 12, 5, 5)}, "weight must be of kernel size = 1 or 3, got 5"),
    ({"weight": image(10, 8, 3, 3)}, "weight must be [Cout, C, k, k] = [10, 12, 3, 3], got [10, 8, 3, 3]"),
    ({"weight": torch.ones(10, 12, 3, 3)}, "weight must be in torch.channels_last format = strides [108, 1, 36, 12]"),
    ({"weight": image(0, 12, 3, 3)}, "weight must be of at least one output channel = Cout >= 1, got 0"),
    ({"stride": 3}, "stride must be allowed for k = 3 = 1 or 2, got 3"),
    ({"stride": 2, "weight": image(10, 12, 1, 1)}, "stride must be allowed for k = 1 = 1, got 2"),
    ({"upsample": True}, "weight must be the phase weights of phase_weights(weight) = [4, Cout, C, 2, 2]"),
    ({"upsample": True, "stride": 2}, "stride must be 1 with upsample = 1, got 2"),
    (
        {"upsample": True, "weight": phase_weights(image(10, 9, 3, 3))},
        "weight must be [4, Cout, C, 2, 2] = [4, 10, 12, 2, 2], got [4, 10, 9, 2, 2]",
    ),
    (
        {"upsample": True, "weight": torch.ones(4, 10, 12, 2, 2)},
        "weight must be in the order [4][Cout][2][2][C] = strides [480, 48, 1, 24, 12], got strides [480, 48, 4, 2, 1]",
    ),
    ({"bias": torch.zeros(9)}, "bias must be [Cout] = [10], got [9]"),
    ({"bias": torch.zeros(10).bfloat16()}, "bias must be of dtype = float32, got bfloat16"),
    ({"bias": torch.zeros(20)[::2]}, "bias must be dense in its last dimension = stride 1, got stride 2"),
    ({"bias": torch.zeros(10, device="meta")}, "bias must be on the device of the first tensor = cpu, got meta"),
    ({"coefficients": torch.zeros(2, 3, 8)}, "coefficients must be [N, 3, C] = [2, 3, 12], got [2, 3, 8]"),
    ({"coefficients": torch.zeros(2, 3, 12).half()}, "coefficients must be of dtype = float32, got float16"),
    ({"coefficients": torch.zeros(2, 12, 3).mT}, "coefficients must be contiguous = True, got False"),
    ({"coefficients": torch.zeros(2, 3, 12, device="meta")}, "coefficients must be on the device of the first tensor"),
    ({"coefficients": None}, "silu must be given with coefficients = False without them, got True"),
    ({"shortcut": None}, "shortcut and shortcut_weight must be given together = both or none, got one of them"),
    ({"shortcut_weight": None}, "shortcut and shortcut_weight must be given together = both or none, got one of them"),
    (
        {"shortcut": None, "shortcut_weight": None},
        "shortcut_skip must be given with shortcut = None without it, got [2, 2, 6, 4]",
    ),
    ({"shortcut": image(2, 3, 3, 2)}, "shortcut must be [N, C, H, W] = [2, 3, 6, 4], got [2, 3, 3, 2]"),
    ({"shortcut_skip": image(1, 2, 6, 4)}, "shortcut_skip must be [N, C, H, W] = [2, 2, 6, 4], got [1, 2, 6, 4]"),
    ({"shortcut_weight": torch.zeros(10, 3)}, "shortcut_weight must be [Cout, Cs] = [10, 5], got [10, 3]"),
    ({"shortcut_weight": torch.zeros(10, 5).half()}, "shortcut_weight must be of dtype = float32, got float16"),
    ({"shortcut_weight": torch.zeros(5, 10).mT}, "shortcut_weight must be contiguous = True, got False"),
    ({"shortcut_weight": torch.zeros(10, 5, device="meta")}, "shortcut_weight must be on the device of the first"),
    ({"time_shift": torch.zeros(2, 9)}, "time_shift must be [N, Cout] = [2, 10], got [2, 9]"),
    ({"time_shift": torch.zeros(10, 2).mT}, "time_shift must be dense in its last dimension = stride 1, got stride 2"),
    ({"residual": image(2, 10, 6, 3)}, "residual must be [N, C, H, W] = [2, 10, 6, 4], got [2, 10, 6, 3]"),
    ({"out": image(2, 9, 6, 4)}, "out must be [N, C, H, W] = [2, 10, 6, 4], got [2, 9, 6, 4]"),
    ({"out": image(2, 10, 6, 4).half()}, "out must be of dtype = float32, got float16"),
    ({"out": torch.ones(2, 10, 6, 4)}, "out must be in torch.channels_last format = strides [240, 1, 40, 10]"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "message"), REFUSALS, ids=[message[:60] for _, message in REFUSALS])
def test_refusals(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ContractError, match=re.escape(f"conv2d: {message}")):
        conv2d(**(good() | change))


@pytest.mark.parametrize("name", ["x", "skip", "weight", "residual"])
def test_out_overlaps_no_input(name: str) -> None:
    memory = torch.zeros(4096)
    call = good() | {"with_stats": False}
    call["out"] = memory[:480].as_strided((2, 10, 6, 4), (240, 1, 40, 10))
    call[name] = memory[100:].as_strided(call[name].shape, call[name].stride())
    with pytest.raises(ContractError, match=f"conv2d: out must be apart from {name} = no overlap, got overlapping"):
        conv2d(**call)


def test_gradients_are_refused_not_dropped() -> None:
    call = good() | {"weight": good()["weight"].requires_grad_()}
    with pytest.raises(ContractError, match="no input must require grad"):
        conv2d(**call)
    with torch.no_grad():
        conv2d(**call)


def test_good_call_is_good() -> None:
    out, stats = conv2d(**good())
    assert stats_error(out, stats).abs().max() <= torch.finfo(torch.float32).eps


def test_phase_weights_refuse_another_kernel() -> None:
    with pytest.raises(
        ContractError, match=re.escape("weight must be 3x3 weights = [Cout, C, 3, 3], got [2, 2, 1, 1]")
    ):
        phase_weights(torch.zeros(2, 2, 1, 1))


def test_empty_batch() -> None:
    out, stats = conv2d(image(0, 4, 6, 5), image(3, 4, 3, 3), stride=2, with_stats=True)
    assert out.shape == (0, 3, 3, 3)
    assert stats.partials.shape == (0, 1, 2, 3)
    assert stats.counts.sum() == 9


@pytest.mark.parametrize("backend", HERE)
def test_upsample_is_interpolate_and_conv(backend: str) -> None:
    """In float64 where the backend has it: there the phases' sums of weights cost nothing that a test could see."""
    dtype = torch.float64 if torch.float64 in OP.backends[backend].dtypes else torch.float32
    x, weight = image(2, 7, 5, 9).to(dtype), image(6, 7, 3, 3, seed=1).to(dtype)
    expected = F.conv2d(F.interpolate(x, scale_factor=2.0, mode="nearest"), weight, padding=1)
    with use_backend(backend):
        out = conv2d(x, phase_weights(weight), upsample=True)
    torch.testing.assert_close(out, expected, rtol=0, atol=100 * torch.finfo(dtype).eps)


def test_phase_weights_are_rounded_once() -> None:
    weight = image(3, 4, 3, 3)
    phases, wide = phase_weights(weight.bfloat16()), phase_weights(weight.bfloat16().double())
    assert torch.equal(phases, wide.bfloat16())
    assert phases.permute(0, 1, 3, 4, 2).is_contiguous()


@pytest.mark.parametrize("backend", HERE)
@pytest.mark.parametrize("name", ["seam", "pointwise_all", "stride_odd", "upsample_all", "shortcut_skip"])
def test_virtual_concat_is_cat(backend: str, name: str) -> None:
    """Bits may differ (a backend may end its vectors at the seam), values only by the order of a sum."""
    case = next(case for case in AWKWARD if case.name == name)
    virtual = case.inputs(torch.float32)
    real = dict(virtual)
    for first, second in (("x", "skip"), ("shortcut", "shortcut_skip")):
        if second in real:
            real[first] = torch.cat([real[first], real.pop(second)], 1)
    with use_backend(backend):
        torch.testing.assert_close(call(virtual)["out"], call(real)["out"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", HERE)
def test_border_is_zero_after_the_prologue(backend: str) -> None:
    """An offset of 5 must not leak in from outside: with weights of one, a corner sees 4 positions, the middle 9."""
    x, weight = torch.zeros(1, 1, 3, 3), torch.ones(1, 1, 3, 3)
    coefficients = torch.tensor([[[0.0], [1.0], [5.0]]])
    with use_backend(backend):
        out = conv2d(x, weight, coefficients=coefficients)
    torch.testing.assert_close(out[0, 0], torch.tensor([[20.0, 30, 20], [30, 45, 30], [20, 30, 20]]))


def test_float64_is_for_the_judge() -> None:
    x, weight = image(1, 4, 3, 3).double(), image(4, 4, 3, 3).double()
    for name in set(OP.backends) - {"torch", "reference"}:
        with use_backend(name), pytest.raises(BackendError, match=r"not float64|not on cpu"):
            conv2d(x, weight)


def test_more_positions_than_32_bits_are_left_to_torch() -> None:
    x = torch.empty(1, 4, 2**16, 2**15, device="meta").to(memory_format=torch.channels_last)
    for name in ("triton", "cuda"):
        limits = OP.backends[name].limits
        assert limits is not None
        assert limits(x, image(4, 4, 3, 3), None, 1, False) == "takes up to 2147479552 positions a sample"
        assert limits(x[:, :, :-1], image(4, 4, 3, 3), None, 1, False) is None
        assert limits(x[:, :, :-1], phase_weights(image(4, 4, 3, 3)), None, 1, True) is not None
        # A tile of 128 positions at the end of 2^31 - 1 would count on at -2^31, which is "inside".
        edge = torch.empty(1, 4, 1, 2**31 - 1, device="meta").to(memory_format=torch.channels_last)
        assert limits(edge, image(4, 4, 3, 3), None, 1, False) is not None


def test_torch_in_float64_keeps_float64() -> None:
    """One sample: the time shift becomes a part of the bias, which must not pass through float32."""
    x, weight = image(1, 4, 5, 5).double(), image(6, 4, 3, 3).double()
    generator = torch.Generator().manual_seed(1)
    bias, shift = (torch.randn(size, generator=generator, dtype=torch.float64) for size in ((6,), (1, 6)))
    found = {}
    for backend in ("torch", "reference"):
        with use_backend(backend):
            found[backend] = conv2d(x, weight, bias, time_shift=shift)
    torch.testing.assert_close(found["torch"], found["reference"], rtol=0, atol=1e-13)


@pytest.mark.parametrize("backend", INTERPRETED)
def test_a_nan_stays_where_its_window_reaches(backend: str) -> None:
    """One position and channel of one sample, a border is 0, not NaN times 0."""
    x, weight = image(2, 5, 7, 9), image(4, 5, 3, 3, seed=1)
    x[1, 2, 0, 4] = float("nan")
    coefficients = torch.tensor([0.1, 1.2, 0.3])[None, :, None].repeat(2, 1, 5)
    with use_backend(backend):
        out, stats = conv2d(x, weight, coefficients=coefficients, silu=True, with_stats=True)
    reached = torch.zeros(2, 4, 7, 9, dtype=torch.bool)
    reached[1, :, :2, 3:6] = True
    assert torch.equal(out.isnan(), reached)
    assert torch.equal(stats.partials[:, :, 0].isnan().any(1).any(1), torch.tensor([False, True]))


@pytest.mark.parametrize("backend", INTERPRETED)
def test_rows_further_apart_than_32_bits(backend: str) -> None:
    """The time shift of a sample may begin more than 2^31 elements after that of the one before."""
    try:
        memory = torch.empty(2**31 + 2**10, dtype=torch.bfloat16)  # almost none of it is ever touched
    except RuntimeError:
        pytest.skip("needs 4 GiB of address space")
    shift = memory.as_strided((2, 6), (2**31 + 64, 1))
    shift.copy_(torch.arange(12).view(2, 6))
    with use_backend(backend):
        out = conv2d(image(2, 3, 2, 2).bfloat16() * 0, image(6, 3, 1, 1).bfloat16(), time_shift=shift)
    assert torch.equal(out[:, :, 0, 0].float(), torch.arange(12.0).view(2, 6))
