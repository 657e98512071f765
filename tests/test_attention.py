"""Attention beyond the matrix of test_ops: what is not finite, strange strides, limits that say why."""

from __future__ import annotations

import pytest
import torch

from idm_fast.kernels import extension
from idm_fast.ops import OPS, BackendError, attention, use_backend

BACKENDS = ("triton", "cpu", "torch", "reference")


def run(backend: str, *args: torch.Tensor, **options: float) -> torch.Tensor:
    """Runs on a CPU, or skips with the backend's reason."""
    try:
        with use_backend(backend):
            return attention(*args, **options)
    except BackendError as error:
        pytest.skip(str(error))


def packed(n: int, length: int, heads: int, d: int, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return list(torch.randn(n, length, 3, heads, d, generator=generator).to(dtype).unbind(2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("which", ["q", "k", "v"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_stays_in_its_head(backend: str, which: str, dtype: torch.dtype) -> None:
    views = packed(2, 20, 3, 16, dtype)
    views["qkv".index(which)][1, 7, 2, 5] = float("nan")
    y = run(backend, *views)
    bad = torch.zeros(y.shape, dtype=torch.bool)
    if which == "q":
        bad[1, 7, 2] = True  # one query
    elif which == "k":
        bad[1, :, 2] = True  # a weight of every query
    else:
        bad[1, :, 2, 5] = True  # one channel of every query
    assert torch.equal(y.isnan(), bad)


@pytest.mark.skipif(extension.native is None, reason=str(extension.missing))
@pytest.mark.parametrize("which", ["q", "k", "v"])
def test_nan_on_every_instruction_set(which: str) -> None:
    assert extension.native is not None
    views = packed(1, 40, 1, 24)
    views["qkv".index(which)][0, 33, 0, 20] = float("nan")
    expected = run("reference", *views).isnan()
    try:
        for isa in extension.native.cpu_isas():
            extension.native.set_cpu_isa(isa)
            assert torch.equal(run("cpu", *views).isnan(), expected), isa
    finally:
        extension.native.set_cpu_isa("")


@pytest.mark.parametrize("backend", BACKENDS)
def test_scores_that_fall_far_behind_weigh_nothing(backend: str) -> None:
    """Key blocks whose maximum is far below or far above the one before: the correction is 0, not a NaN."""
    q = torch.ones(1, 3, 1, 16)
    v = torch.arange(600.0).reshape(1, 600, 1, 1).expand(1, 600, 1, 16).contiguous()
    for best in (0, 300, 599):
        k = torch.full((1, 600, 1, 16), -1e4)
        k[0, best] = 1e4
        torch.testing.assert_close(run(backend, q, k, v), torch.full((1, 3, 1, 16), float(best)), rtol=0, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_any_strides_with_dense_rows(backend: str) -> None:
    storage = torch.randn(2, 3, 9, 2, 20, generator=torch.Generator().manual_seed(1))
    q = storage[:, 0, :, :, 3:19].transpose(0, 1)[:, :1].transpose(0, 1)  # rows that start anywhere
    k = storage[:1, 1, ::2, :, :16]
    v = storage[:1, 2, 4:5, :, 1:17].expand(1, 5, 2, 16)  # one value for all keys
    expected = storage[:1, 2, 4:5, :, 1:17].expand(1, 9, 2, 16)
    torch.testing.assert_close(run(backend, q[:1], k, v), expected)


def test_limits_name_the_number() -> None:
    wide = torch.zeros(1, 2, 1, 513)
    assert "width <= 512, not 513" in str(OPS["attention"].backends["triton"].limits(wide, wide, wide, 1.0, None))
    far = torch.empty(1, device="meta").as_strided((1, 2, 1, 16), (1, 2**24 + 1, 1, 1))
    reason = OPS["attention"].backends["triton"].limits(wide[..., :16], far, far, 1.0, None)
    assert reason == "takes positions at most 16777216 elements apart, not 16777217"


# Triton's interpreter is numpy, and of the rows beyond the last query, zeros times infinity, it speaks too.
@pytest.mark.filterwarnings("ignore:invalid value encountered", "ignore:All-NaN slice encountered")
@pytest.mark.parametrize("backend", BACKENDS)
def test_awkward_scores(backend: str) -> None:
    """Products of 1e11, keys whose score is minus infinity, one value read by all (stride 0)."""
    q = torch.full((1, 70, 2, 24), 6e4)
    k = torch.full((1, 90, 2, 24), -6e4)
    k[0, 77] = 6e4
    v = torch.randn(1, 90, 1, 24, generator=torch.Generator().manual_seed(2)).expand(1, 90, 2, 24)
    torch.testing.assert_close(run(backend, q, k, v), v[:, 77:78].expand(1, 70, 2, 24), rtol=0, atol=0)
    torch.testing.assert_close(run(backend, q, k, v, scale=0.0), v.mean(1, keepdim=True).expand(1, 70, 2, 24))
    k[0, :77] = -float("inf")
    torch.testing.assert_close(run(backend, q, k, v), v[:, 77:78].expand(1, 70, 2, 24), rtol=0, atol=0)
    same = torch.randn(1, 33, 1, 24, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(run(backend, same, same, same), run("reference", same, same, same))


def test_cuda_limits_name_the_reason() -> None:
    limits = OPS["attention"].backends["cuda"].limits
    assert limits is not None
    good = torch.zeros(2, 4, 3, 40, dtype=torch.float16)
    assert limits(good, good, good, 1.0, None) is None
    odd = good[..., :36]
    assert limits(odd, odd, odd, 1.0, None) == "takes heads of width <= 512 and a multiple of 8, not 36"
    wide = torch.zeros(1, 1, 1, 520, dtype=torch.float16)
    assert "width <= 512" in str(limits(wide, wide, wide, 1.0, None))
    shifted = torch.zeros(2, 4, 3, 44, dtype=torch.float16)[..., 4:]
    assert limits(good, shifted, good, 1.0, None) == "takes rows aligned to 16 bytes"


def test_xformers_limits_name_the_reason() -> None:
    """A call that none of its kernels takes must go on to torch, the next row."""
    limits = OPS["attention"].backends["xformers"].limits
    assert limits is not None
    wide = torch.zeros(1, 4, 1, 1024, dtype=torch.float16)
    assert limits(wide, wide, wide, 1.0, None) is None
    odd = wide[..., :1020].contiguous()
    assert limits(odd, odd, odd, 1.0, None) == "takes heads of a width that is a multiple of 8, not 1020"
    assert limits(wide, wide, wide, -1.0, None) == "takes scales above 0, not -1.0"
    shifted = torch.zeros(1, 4, 1, 1028, dtype=torch.float16)[..., 4:]
    assert limits(wide, shifted, wide, 1.0, None) == "takes rows aligned to 16 bytes"


def test_xformers_has_a_row_and_a_reason() -> None:
    assert OPS["attention"].why_not("xformers", "cpu", torch.float32) == "runs on cuda, not on cpu"


@pytest.mark.skipif(extension.native is None, reason=str(extension.missing))
def test_native_refusals() -> None:
    """The native layer refuses by itself what would read or write outside a buffer."""
    assert extension.native is not None
    q, k, _ = packed(1, 4, 2, 8)
    view, out = extension.view, torch.zeros(1, 4, 2, 8)
    call = extension.native.attention
    with pytest.raises(ValueError, match=r"k must be \[N, \*, heads, d\]"):
        call(view(q), view(k[..., :4]), view(k), view(out), 1.0, 1)
    with pytest.raises(ValueError, match="v must be of k's shape"):
        call(view(q), view(k), view(k[:, :3]), view(out), 1.0, 1)
    with pytest.raises(ValueError, match="out must be as q and contiguous"):
        call(view(q), view(k), view(k), view(q), 1.0, 1)
    with pytest.raises(ValueError, match="dense in its last dimension"):
        call(view(q.transpose(1, 3)[..., :4]), view(k), view(k), view(out), 1.0, 1)


@pytest.mark.skipif(extension.native is None, reason=str(extension.missing))
def test_far_behind_on_every_instruction_set() -> None:
    assert extension.native is not None
    try:
        for isa in extension.native.cpu_isas():
            extension.native.set_cpu_isa(isa)
            test_scores_that_fall_far_behind_weigh_nothing("cpu")
    finally:
        extension.native.set_cpu_isa("")


@pytest.mark.skipif(extension.native is None, reason=str(extension.missing))
def test_shared_packing_gives_the_same_bits() -> None:
    """Heads too large for every worker to pack its own are packed by all together."""
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(1, 50, 3, 512, generator=generator)
    k, v = torch.randn(2, 1, 2000, 3, 512, generator=generator)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            results.append(run("cpu", q, k, v))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1])
    torch.testing.assert_close(results[0], run("reference", q, k, v), rtol=1e-5, atol=1e-5)
