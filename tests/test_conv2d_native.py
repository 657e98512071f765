"""The native convolutions by themselves: packed weights that follow the weight, several callers, their own checks."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor

from idm_fast.kernels import extension
from idm_fast.kernels.channel_stats import combine
from idm_fast.kernels.conv2d.cases import stats_error
from idm_fast.kernels.conv2d_int8 import quantise_weight
from idm_fast.ops import conv2d, conv2d_int8, phase_weights, use_backend

pytestmark = pytest.mark.skipif(extension.native is None, reason=str(extension.missing))


@pytest.fixture(autouse=True)
def on_the_cpu() -> Iterator[None]:
    with use_backend("cpu"):
        yield
    if extension.native is not None:
        extension.native.set_cpu_isa("")


def image(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return noise.to(dtype).contiguous(memory_format=torch.channels_last)


def test_packed_weight_follows_the_weight() -> None:
    x, weight = image(1, 8, 5, 5), image(12, 8, 3, 3)
    first = conv2d(x, weight)
    weight.mul_(2.0)
    torch.testing.assert_close(conv2d(x, weight), 2 * first)
    with torch.inference_mode():
        weight.mul_(2.0)
        torch.testing.assert_close(conv2d(x, weight), 4 * first)
        made_here = weight * 0.5
        torch.testing.assert_close(conv2d(x, made_here), 2 * first)
        made_here.mul_(2.0)  # no version counter sees this
        torch.testing.assert_close(conv2d(x, made_here), 4 * first)


def test_packed_weight_follows_the_instruction_set() -> None:
    x, weight = image(1, 8, 5, 5, dtype=torch.bfloat16), image(40, 8, 3, 3, dtype=torch.bfloat16)
    steps, scale = quantise_weight(weight)
    activation = torch.tensor([[0.03, 128.0]])
    results = []
    for isa in extension.native.cpu_isas() * 2:
        extension.native.set_cpu_isa(isa)
        results.append((conv2d(x, weight).float(), conv2d_int8(x, steps, scale, activation).float()))
    for plain, quantised in results[1:]:
        torch.testing.assert_close(plain, results[0][0], rtol=2e-2, atol=2e-2)
        torch.testing.assert_close(quantised, results[0][1], rtol=1e-2, atol=1e-2)


def test_packed_weight_dies_with_the_weight() -> None:
    from idm_fast.kernels.conv2d.native import _packed

    x, weight = image(1, 8, 5, 5), image(12, 8, 3, 3)
    gc.collect()
    before = len(_packed)
    conv2d(x, weight)
    assert len(_packed) == before + 1
    del weight
    gc.collect()
    assert len(_packed) == before


def test_two_callers() -> None:
    """Two threads with different layers at once give what each gives alone."""
    jobs: list[dict[str, Any]] = [
        {"x": image(1, c, 12, 12), "weight": image(40, c, 3, 3), "with_stats": True, "silu": True}
        | {"coefficients": torch.ones(1, 3, c)}
        for c in (16, 96)
    ]
    alone = [conv2d(**job) for job in jobs]

    def work(index: int) -> bool:
        with use_backend("cpu"), torch.no_grad():
            for _ in range(60):
                out, stats = conv2d(**jobs[index])
                if not torch.equal(out, alone[index][0]) or not torch.equal(stats.partials, alone[index][1].partials):
                    return False
        return True

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, [0, 1, 0, 1]))


@pytest.mark.parametrize("upsample", [False, True])
def test_statistics_have_a_piece_per_block(upsample: bool) -> None:
    x, weight = image(2, 6, 21, 5), image(10, 6, 3, 3)
    weight = phase_weights(weight) if upsample else weight
    out, stats = conv2d(x, weight, upsample=upsample, with_stats=True)
    phases = 4 if upsample else 1
    assert stats.counts.tolist() == [40.0] * 2 * phases + [25.0] * phases  # 8, 8 and 5 rows of 5 columns
    assert stats_error(out, stats).abs().max() <= 1
    mean, m2 = combine(stats)
    torch.testing.assert_close(mean, out.double().mean((2, 3)), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(m2, out.double().var((2, 3), correction=0) * out[0, 0].numel(), rtol=1e-5, atol=1e-6)


def test_native_checks() -> None:
    """The native layer refuses by itself what would write outside a buffer."""
    from idm_fast.kernels.conv2d.packing import pack_weight
    from idm_fast.kernels.extension import view

    native = extension.native
    x, weight, out = image(1, 8, 5, 5), image(12, 8, 3, 3), image(1, 12, 5, 5)
    none = (None,) * 5

    def call(x: Any, packed: Any, out: Any, kernel: int = 3, stride: int = 1, *stats: Any) -> None:
        partials, counts = stats or (None, None)
        native.conv2d(x, None, None, False, packed, kernel, stride, False, *none, None, out, partials, counts, 1)  # type: ignore

    two, half = torch.zeros(2), torch.zeros(1, 1, 2, 12)
    packed, partials, nchw = pack_weight(weight), torch.zeros(1, 2, 2, 12), x.contiguous()
    wide, low = image(1, 40, 5, 5), image(1, 12, 4, 5)  # named, because a view keeps nothing alive
    call(view(x), view(packed), view(out))
    for arguments, message in [
        ((view(x), view(packed[:-64]), view(out)), "weight must be packed"),
        ((view(x), view(packed), view(wide)), "weight must be packed"),
        ((view(x), view(packed), view(low)), "out must be of x's dtype"),
        ((view(nchw), view(packed), view(out)), "x must be a float tensor in NHWC order"),
        ((view(x), view(packed), view(out), 5), "the kernel must be 1x1 or 3x3"),
        ((view(x), view(packed), view(out), 3, 3), "stride must be 1, or 2"),
        ((view(x), view(packed), view(out), 3, 1, view(partials), None), "partials and counts must be given together"),
        ((view(x), view(packed), view(out), 3, 1, view(partials), view(two)), "partials must be"),
        ((view(x), view(packed), view(out), 3, 1, view(half), view(two)), "counts must be"),
    ]:
        with pytest.raises(ValueError, match=message):
            call(*arguments)
