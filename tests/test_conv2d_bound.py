"""Convolutions that come again and again: packed weights, room for statistics, bound calls."""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from idm_fast.kernels import extension
from idm_fast.ops import (
    OPS,
    ChannelStats,
    ContractError,
    PackedWeight,
    bind_conv2d,
    bind_conv2d_fp8,
    bind_conv2d_int8,
    conv2d,
    conv2d_fp8,
    conv2d_fp8_stats,
    conv2d_int8,
    conv2d_int8_stats,
    conv2d_stats,
    suite,
    use_backend,
)

FUNCTIONS: dict[str, tuple[Callable[..., Any], Callable[..., ChannelStats], Callable[..., Callable[[], Any]]]] = {
    "conv2d": (conv2d, conv2d_stats, bind_conv2d),
    "conv2d_int8": (conv2d_int8, conv2d_int8_stats, bind_conv2d_int8),
    "conv2d_fp8": (conv2d_fp8, conv2d_fp8_stats, bind_conv2d_fp8),
}
HERE = [
    (op, backend)
    for op in FUNCTIONS
    for backend in OPS[op].backends
    if OPS[op].why_not(backend, "cpu", torch.bfloat16) is None
]
NAMES = ["idm128_16px", "stride_odd", "upsample_all", "odd", "plain", "pointwise"]
native_only = pytest.mark.skipif(extension.native is None, reason=str(extension.missing))


@pytest.fixture(autouse=True)
def isa_as_before() -> Iterator[None]:
    yield
    if extension.native is not None:
        extension.native.set_cpu_isa("")


def inputs_of(op: str, name: str, dtype: torch.dtype = torch.bfloat16) -> dict[str, Any]:
    return next(case for case in suite(op).cases if case.name == name).inputs(dtype)


def poisoned(tensor: Tensor) -> Tensor:
    return tensor.fill_(float("nan"))


def image(*shape: int, seed: int = 0) -> Tensor:
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return noise.contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("op", "backend"), HERE)
def test_bound_calls_give_the_bits_of_ordinary_ones(op: str, backend: str, name: str) -> None:
    function, stats_of, bind = FUNCTIONS[op]
    inputs = inputs_of(op, name)
    if backend == "triton" and inputs["x"].numel() > 20_000:
        pytest.skip("too large for Triton's interpreter")
    with use_backend(backend):
        result = function(**inputs)
        expected, stats = result if inputs["with_stats"] else (result, None)
        inputs["weight"] = PackedWeight(inputs["weight"])
        inputs["out"] = poisoned(torch.empty_like(expected))
        if stats is not None:
            inputs["out_stats"] = room = stats_of(**inputs)
            assert [t.shape for t in room] == [t.shape for t in stats]
            poisoned(room.partials), poisoned(room.counts)
        call = bind(**inputs)
        assert inputs["out"].isnan().all(), "binding computes nothing"
    for _ in range(2):
        call()
        assert torch.equal(inputs["out"], expected)
        if stats is not None:
            assert all(torch.equal(a, b) for a, b in zip(inputs["out_stats"], stats, strict=True))
        poisoned(inputs["out"])
    with use_backend(backend):  # and the ordinary call writes to the same places
        found = function(**inputs)
    assert (found[0] if stats else found) is inputs["out"]
    assert stats is None or found[1].partials is inputs["out_stats"].partials
    assert torch.equal(inputs["out"], expected)


@native_only
@pytest.mark.parametrize("op", ["conv2d", "conv2d_int8"])
def test_a_bound_call_allocates_nothing(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _, stats_of, bind = FUNCTIONS[op]
    inputs = inputs_of(op, "idm128_16px")
    shape = inputs["residual"]
    inputs |= {"weight": PackedWeight(inputs["weight"]), "out": torch.empty_like(shape)}
    with use_backend("cpu"):
        inputs["out_stats"] = stats_of(**inputs)
        call = bind(**inputs)
    call()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        call()
    assert [event.name for event in profile.events() or []] == [], "torch is not called at all"


@native_only
@pytest.mark.parametrize("op", ["conv2d", "conv2d_int8"])
def test_a_packed_weight_is_packed_once(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    function = FUNCTIONS[op][0]
    packs: list[int] = []
    name = f"{op}_pack"
    module = importlib.import_module(f"idm_fast.kernels.{'conv2d.packing' if op == 'conv2d' else 'conv2d_int8.native'}")
    monkeypatch.setattr(module, "native", counting(extension.native, name, packs))
    with torch.inference_mode(), use_backend("cpu"):
        inputs = inputs_of(op, "odd")
        expected, _ = function(**inputs)
        function(**inputs)
        assert len(packs) == 2, "an inference tensor has no version to know it by"
        inputs["weight"] = PackedWeight(inputs["weight"])
        for _ in range(3):
            assert torch.equal(function(**inputs)[0], expected)
    assert len(packs) == 3
    assert inputs["weight"].packed_bytes > 0


def counting(module: Any, name: str, calls: list[int]) -> Any:
    """``module`` whose function ``name`` notes each call."""

    class Stand:
        def __getattr__(self, asked: str) -> Any:
            if asked == name:
                calls.append(1)
            return getattr(module, asked)

    return Stand()


@native_only
@pytest.mark.parametrize("inference", [False, True])
def test_a_packed_weight_takes_new_values_where_the_old_ones_lie(inference: bool) -> None:
    x, out = image(1, 8, 5, 5), image(1, 20, 5, 5)
    with torch.inference_mode(inference):
        first, second = image(20, 8, 3, 3, seed=1), image(20, 8, 3, 3, seed=2)
        weight = PackedWeight(first.clone(memory_format=torch.preserve_format))
        with use_backend("cpu"):
            call = bind_conv2d(x, weight, out=out)
            call()
            assert torch.equal(out, conv2d(x, first))
            weight.load(second)
            call()  # bound to the memory
            assert torch.equal(out, conv2d(x, second))
            assert torch.equal(conv2d(x, weight), out)
            for isa in extension.native.cpu_isas():
                extension.native.set_cpu_isa(isa)
                torch.testing.assert_close(conv2d(x, weight), out, rtol=1e-4, atol=1e-4)
            weight.load(first)
            torch.testing.assert_close(conv2d(x, weight), conv2d(x, first), rtol=0, atol=0)
    if not inference:
        weight.mul_(2.0)  # what a counter sees needs no load
        with use_backend("cpu"):
            torch.testing.assert_close(conv2d(x, weight), 2 * conv2d(x, first), rtol=0, atol=0)
    with pytest.raises(ContractError, match=re.escape("weight must be of the shape of the old one = [20, 8, 3, 3]")):
        weight.load(image(20, 8, 1, 1))
    with pytest.raises(ContractError, match="weight must be of dtype = float32, got float16"):
        weight.load(second.half())


def test_a_packed_weight_is_the_weight() -> None:
    weight = torch.nn.Parameter(image(4, 3, 3, 3))
    packed = PackedWeight(weight)
    assert packed.data_ptr() == weight.data_ptr()
    assert not packed.requires_grad
    assert type(packed * 2) is Tensor
    for backend in ("torch", "reference"):
        with use_backend(backend):
            assert torch.equal(conv2d(image(1, 3, 4, 4), packed), conv2d(image(1, 3, 4, 4), weight.detach()))


STATS = ChannelStats(torch.zeros(2, 1, 2, 10), torch.zeros(1))
REFUSALS = [
    ({"with_stats": False}, "out_stats must be given with with_stats = None without it, got ChannelStats"),
    ({"out_stats": (1, 2)}, "out_stats must be what conv2d_stats returns = ChannelStats, got tuple"),
    ({"out_stats": ChannelStats(torch.zeros(2, 1, 2, 9), torch.zeros(1))},
     "out_stats.partials must be [N, P, 2, Cout] = [2, 1, 2, 10], got [2, 1, 2, 9]"),
    ({"out_stats": ChannelStats(torch.zeros(2, 1, 2, 10), torch.zeros(2))}, "out_stats.counts must be [P] = [1]"),
    ({"out_stats": ChannelStats(STATS.partials.double(), STATS.counts)},
     "out_stats.partials must be of dtype = float32, got float64"),
    ({"out_stats": ChannelStats(torch.zeros(2, 1, 10, 2).mT, STATS.counts)}, "out_stats.partials must be contiguous"),
    ({"out_stats": ChannelStats(torch.zeros(2, 7, 2, 10), torch.zeros(7))},
     "out_stats.counts must be [P] of this backend and shape = [1], got [7]"),
    ({"out_stats": ChannelStats(STATS.partials, STATS.partials.view(-1)[:1])},
     "out_stats.counts must be apart from out_stats.partials = no overlap"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "message"), REFUSALS, ids=[message[:60] for _, message in REFUSALS])
@pytest.mark.parametrize("backend", [backend for op, backend in HERE if op == "conv2d"])
def test_refuses_other_rooms(backend: str, change: dict[str, Any], message: str) -> None:
    good = {"x": image(2, 8, 6, 4), "weight": image(10, 8, 3, 3), "with_stats": True, "out": image(2, 10, 6, 4)}
    with use_backend(backend):
        conv2d(**good, out_stats=STATS)
        before = good["out"].clone()
        with pytest.raises(ContractError, match=re.escape(f"conv2d: {message}")):
            conv2d(**(good | {"out_stats": STATS} | change))
    assert torch.equal(good["out"], before)


def test_bound_calls_need_a_place_to_write_to() -> None:
    x, weight, out = image(2, 8, 6, 4), image(10, 8, 3, 3), image(2, 10, 6, 4)
    with pytest.raises(ContractError, match="conv2d: out must be given to a bound call = a tensor to write to, got N"):
        bind_conv2d(x, weight)
    with pytest.raises(ContractError, match="conv2d: out_stats must be given to a bound call"):
        bind_conv2d(x, weight, out=out, with_stats=True)
    with pytest.raises(ContractError, match=re.escape("conv2d: x must be of at least one sample = N >= 1")):
        bind_conv2d(image(0, 8, 6, 4), weight, out=out[:0])
    with pytest.raises(ContractError, match="conv2d: out must be apart from x"):
        bind_conv2d(x, weight[:8].contiguous(memory_format=torch.channels_last), out=x)


def test_room_of_an_empty_batch() -> None:
    x, weight = image(0, 8, 6, 4), image(10, 8, 3, 3)
    room = conv2d_stats(x, weight)
    out, stats = conv2d(x, weight, with_stats=True, out_stats=room)
    assert stats is room
    assert (out.shape, room.partials.shape, room.counts.tolist()) == ((0, 10, 6, 4), (0, 1, 2, 10), [24.0])
