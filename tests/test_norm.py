"""group_norm_silu, channel_stats and norm_coefficients: refusals, NaN, and that the three fit together."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from idm_fast.kernels import extension
from idm_fast.kernels.channel_stats import combine, empty_stats, piece_rows, pieces
from idm_fast.ops import (
    OPS,
    BackendError,
    ChannelStats,
    ContractError,
    channel_stats,
    group_norm_silu,
    norm_coefficients,
    use_backend,
)

BACKENDS = ("triton", "cpu", "torch", "reference")


def image(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(shape, generator=generator).contiguous(memory_format=torch.channels_last)


X, SKIP = image(2, 8, 4, 4), image(2, 4, 4, 4)
STATS, SKIP_STATS = channel_stats(X), channel_stats(SKIP)
ONES = torch.ones(8)


def changed(stats: ChannelStats, **fields: Tensor) -> ChannelStats:
    return stats._replace(**fields)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: channel_stats(X[0]), r"channel_stats: x must be 4-dimensional = \[N, C, H, W\], got \[8, 4, 4\]"),
        (lambda: channel_stats(X.long()), r"channel_stats: x must be of a float dtype = .*, got int64"),
        (lambda: channel_stats(X.contiguous()), r"channel_stats: x must be in torch.channels_last format"),
        (lambda: channel_stats(X[:0]), r"channel_stats: x must be of at least one element = .*, got \[0, 8, 4, 4\]"),
        (lambda: channel_stats(X.clone().requires_grad_()), r"channel_stats: no input must require grad"),
        (lambda: channel_stats(X, out=(X, X)), r"channel_stats: out must be what channel_stats returns = ChannelStats"),
        (
            lambda: channel_stats(X, out=SKIP_STATS),
            r"out.partials must be \[N, P, 2, C\] = \[2, 1, 2, 8\], got \[2, 1,",
        ),
        (
            lambda: channel_stats(X, out=ChannelStats(torch.zeros(2, 3, 2, 8), torch.zeros(3))),
            r"out.counts must be \[P\] of piece_rows = \[1\], got \[3\]",
        ),
        (
            lambda: channel_stats(
                X, out=ChannelStats(X.permute(0, 2, 3, 1).view(-1)[:32].view(2, 1, 2, 8), torch.zeros(1))
            ),
            r"out.partials must be apart from x = no overlap",
        ),
        (lambda: norm_coefficients(X, 2), r"norm_coefficients: stats must be what channel_stats returns"),
        (lambda: norm_coefficients(STATS, 3), r"num_groups must be a divisor of C = divisor of 8, got 3"),
        (
            lambda: norm_coefficients(STATS, 5, skip_stats=SKIP_STATS),
            r"num_groups must be a divisor of C = divisor of 12",
        ),
        (
            lambda: norm_coefficients(changed(STATS, partials=STATS.partials[:, :, 0]), 2),
            r"stats.partials must be per piece, \(mean, M2\) and channel = \[N, P, 2, C\], got \[2, 1, 8\]",
        ),
        (
            lambda: norm_coefficients(changed(STATS, partials=STATS.partials.half()), 2),
            r"stats.partials must be of dtype = float32, got float16",
        ),
        (
            lambda: norm_coefficients(changed(STATS, counts=torch.ones(2)), 2),
            r"stats.counts must be \[P\] = \[1\], got \[2\]",
        ),
        (
            lambda: norm_coefficients(changed(STATS, partials=torch.ones(2, 1, 2, 16)[..., ::2]), 2),
            r"stats.partials must be contiguous = dense strides",
        ),
        (
            lambda: norm_coefficients(STATS, 2, skip_stats=channel_stats(SKIP[:1])),
            r"skip_stats must be of as many samples as stats = 2, got 1",
        ),
        (lambda: norm_coefficients(STATS, 2, ONES[:7]), r"weight must be \[C\] = \[8\], got \[7\]"),
        (lambda: norm_coefficients(STATS, 2, ONES.double()), r"weight must be of dtype = .*, got float64"),
        (lambda: norm_coefficients(STATS, 2, scale=X[:, :, 0, 0]), r"scale and shift must be given together"),
        (
            lambda: norm_coefficients(STATS, 2, scale=torch.ones(8, 2).T, shift=torch.ones(2, 8)),
            r"scale must be dense in its last dimension = stride 1, got stride 2",
        ),
        (lambda: norm_coefficients(STATS, 2, out=torch.ones(2, 3, 7)), r"out must be \[N, 3, C\] = \[2, 3, 8\]"),
        (lambda: norm_coefficients(STATS, 2, out=torch.ones(2, 3, 8).half()), r"out must be of dtype = float32"),
        (lambda: norm_coefficients(STATS, 2, out=torch.ones(2, 8, 3).mT), r"out must be contiguous = dense strides"),
        (lambda: group_norm_silu(X, 2, skip=SKIP[0]), r"skip must be 4-dimensional"),
        (lambda: group_norm_silu(X, 2, skip=SKIP[:, :, :3]), r"skip must be \[N, C2, H, W\] of x = \[2, 4, 4, 4\]"),
        (lambda: group_norm_silu(X, 2, skip=SKIP.half()), r"skip must be of dtype = float32, got float16"),
        (lambda: group_norm_silu(X, 2, skip=SKIP.contiguous()), r"skip must be in torch.channels_last format"),
        (lambda: group_norm_silu(X, 8, skip=SKIP), r"num_groups must be a divisor of C = divisor of 12, got 8"),
        (lambda: group_norm_silu(X, 2, ONES, skip=SKIP), r"weight must be \[C\] = \[12\], got \[8\]"),
        (
            lambda: group_norm_silu(X, 2, skip=SKIP, out=image(2, 8, 4, 4)),
            r"out must be \[N, C1 \+ C2, H, W\] = \[2, 12",
        ),
        (lambda: group_norm_silu(X, 2, stats=SKIP_STATS), r"stats.partials must be \[N, P, 2, C\] = \[2, 1, 2, 8\]"),
        (lambda: group_norm_silu(X, 2, skip_stats=SKIP_STATS), r"skip_stats must be given with skip"),
        (
            lambda: group_norm_silu(X, 2, skip=SKIP, skip_stats=STATS),
            r"skip_stats.partials must be \[N, P, 2, C\] = \[2, 1, 2, 4\]",
        ),
    ],
)
def test_refusals(call: Any, message: str) -> None:
    with pytest.raises(ContractError, match=message):
        call()


def test_outputs_must_lie_apart_from_small_inputs() -> None:
    room = torch.zeros(400)
    out, small = room[:256].view(2, 4, 4, 8).permute(0, 3, 1, 2), room[200:208]
    with pytest.raises(ContractError, match="out must be apart from weight = no overlap"):
        group_norm_silu(X, 2, small, out=out)
    with pytest.raises(ContractError, match="out must be apart from shift = no overlap"):
        group_norm_silu(X, 2, scale=torch.ones(2, 8), shift=room[240:256].view(2, 8), out=out)
    inside = changed(STATS, partials=room[224:256].view(2, 1, 2, 8))
    with pytest.raises(ContractError, match=r"out must be apart from stats\.partials = no overlap"):
        group_norm_silu(X, 2, stats=inside, out=out)


def test_groups_are_counted_in_whole_numbers() -> None:
    for groups in (2.0, True):
        with pytest.raises(ContractError, match="num_groups must be a divisor of C = divisor of 8, got"):
            group_norm_silu(X, groups)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["group_norm_silu", "channel_stats", "philox_normal"])
def test_triton_refuses_more_samples_than_a_grid_has(name: str) -> None:
    many = torch.zeros(65536, 1, 1, 1)
    arguments = {
        "group_norm_silu": (many, 1, None, None, 1e-5, None, None, True, None, None, None, many),
        "channel_stats": (many, None),
        "philox_normal": (torch.zeros(65536, dtype=torch.int64), (65536, 1, 1, 1), 0),
    }[name]
    limits = OPS[name].backends["triton"].limits
    assert limits is not None
    assert limits(*arguments) == "takes at most 65535 samples, not 65536"


@pytest.mark.skipif(extension.native is None, reason=str(extension.missing))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_large_results_go_past_the_caches_and_are_the_same(dtype: torch.dtype) -> None:
    """From 8 MiB on other stores are used; the same rows in small parts must have the same bits."""
    native = extension.native
    assert native is not None
    x, skip = image(1, 64, 256, 256).to(dtype), image(1, 32, 256, 256).to(dtype)
    stats, skip_stats = channel_stats(x), channel_stats(skip)
    quarter = torch.tensor([1.0, 0.25])[:, None]  # of the sums of squares: exactly a part's with the same variance
    parts_stats = [ChannelStats(s.partials * quarter, s.counts / 4) for s in (stats, skip_stats)]
    try:
        for isa in native.cpu_isas():
            native.set_cpu_isa(isa)
            with use_backend("cpu"):
                whole = group_norm_silu(x, 8, skip=skip, stats=stats, skip_stats=skip_stats)
                for first in range(0, 256, 64):
                    a, b = (t[:, :, first : first + 64] for t in (x, skip))
                    part = group_norm_silu(a, 8, skip=b, stats=parts_stats[0], skip_stats=parts_stats[1])
                    assert torch.equal(whole[:, :, first : first + 64], part), isa
    finally:
        native.set_cpu_isa("")


def test_outputs_must_lie_apart() -> None:
    room = torch.zeros(2, 4, 4, 12)
    x, out = room[..., :8].permute(0, 3, 1, 2).contiguous(memory_format=torch.channels_last), room.permute(0, 3, 1, 2)
    overlapping = room.view(-1)[:128].view(2, 4, 4, 4).permute(0, 3, 1, 2)
    with pytest.raises(ContractError, match="out must be apart from skip = no overlap"):
        group_norm_silu(x, 2, skip=overlapping, out=out)


@pytest.mark.skipif(extension.native is None, reason=str(extension.missing))
def test_native_checks_for_itself() -> None:
    native, view = extension.native, extension.view
    assert native is not None
    partials, counts, none = view(STATS.partials), view(STATS.counts), (None,) * 4
    with pytest.raises(ValueError, match="channel_stats: partials must be"):
        native.channel_stats(view(X), view(SKIP_STATS.partials), counts, 64, 1)
    with pytest.raises(ValueError, match="channel_stats: x must have elements"):
        native.channel_stats(view(X), partials, counts, 0, 1)
    with pytest.raises(ValueError, match="norm_coefficients: stats must be contiguous float32"):
        native.norm_coefficients(None, counts, None, None, *none, 2, 1e-5, view(torch.ones(2, 3, 8)), 1)
    with pytest.raises(ValueError, match="norm_coefficients: out must be"):
        native.norm_coefficients(partials, counts, None, None, *none, 2, 1e-5, view(torch.ones(2, 3, 7)), 1)
    rest = (*none, view(image(2, 4, 4, 5)), *none)
    with pytest.raises(ValueError, match="group_norm_silu: skip must be of x's shape"):
        native.group_norm_silu(view(X), view(X), *rest, 2, 1e-5, True, 1)


def test_pieces_cover_the_rows() -> None:
    for rows in (*range(1, 300), 4096, 8191, 8192, 8193, 2**18, 2**31 + 1):
        size, count = piece_rows(rows), pieces(rows)
        assert (count - 1) * size < rows <= count * size
        assert count <= 128
        assert size % 64 == 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_three_are_one_group_norm(backend: str) -> None:
    """Statistics, coefficients, application, step by step over two tensors, against torch on their concatenation."""
    x, skip = image(2, 6, 9, 8) * 3 + 1, image(2, 4, 9, 8) - 2
    weight, bias = torch.linspace(0.5, 2, 10), torch.linspace(-1, 1, 10)
    try:
        with use_backend(backend):
            stats, skip_stats = channel_stats(x), channel_stats(skip)
            table = norm_coefficients(stats, 5, weight, bias, skip_stats=skip_stats)
            whole = group_norm_silu(x, 5, weight, bias, skip=skip, stats=stats, skip_stats=skip_stats, silu=False)
    except BackendError as error:
        pytest.skip(str(error))
    both = torch.cat([x, skip], 1)
    centre, gain, offset = table[:, :, :, None, None].unbind(1)
    expected = torch.nn.functional.group_norm(both, 5, weight, bias)
    torch.testing.assert_close((both - centre) * gain + offset, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(whole, expected, rtol=1e-5, atol=1e-5)
    mean, m2 = combine(stats)
    torch.testing.assert_close(mean, x.double().mean((2, 3)), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(m2, x.double().var((2, 3), correction=0) * 72, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_stays_in_its_group_across_the_seam(backend: str) -> None:
    x, skip = image(2, 10, 5, 4), image(2, 8, 5, 4)
    skip[0, 1, 2, 3] = float("nan")  # channel 11 of 18, in groups of 6: 6..11
    try:
        with use_backend(backend):
            y = group_norm_silu(x, 3, skip=skip)
            stats = channel_stats(skip)
    except BackendError as error:
        pytest.skip(str(error))
    assert y[0, 6:12].isnan().all()
    assert y[0, :6].isfinite().all()
    assert y[0, 12:].isfinite().all()
    assert y[1].isfinite().all()
    assert stats.partials.isnan().nonzero()[:, [0, 3]].unique(dim=0).tolist() == [[0, 1]]


def test_calls_that_come_again_are_as_checked_as_the_first() -> None:
    weight = torch.linspace(0.5, 2, 12)
    first = group_norm_silu(X, 4, weight, skip=SKIP)
    assert torch.equal(group_norm_silu(X, 4, weight, skip=SKIP), first)
    assert first.is_contiguous(memory_format=torch.channels_last)
    assert not torch.equal(group_norm_silu(X, 4, weight, skip=SKIP, eps=1.0), first)
    with pytest.raises(ContractError, match="no input must require grad"):
        group_norm_silu(X, 4, weight.clone().requires_grad_(), skip=SKIP)
    with pytest.raises(ContractError, match="skip must be in torch"):
        group_norm_silu(X, 4, weight, skip=SKIP.contiguous())
    with use_backend("torch"):
        torch.testing.assert_close(group_norm_silu(X, 4, weight, skip=SKIP), first)


def test_empty() -> None:
    assert group_norm_silu(X[:0], 2, skip=SKIP[:0]).shape == (0, 12, 4, 4)
    assert norm_coefficients(ChannelStats(STATS.partials[:0], STATS.counts), 2).shape == (0, 3, 8)
    assert empty_stats(X).partials.shape == (2, 1, 2, 8)


THREADS = """
import torch
from idm_fast.ops import group_norm_silu, use_backend

with use_backend("cpu"):
    for shape in ((1, 64, 32, 32), (3, 64, 33, 17), (5, 32, 40, 40), (1, 8, 1, 1)):
        x = torch.randn(shape).contiguous(memory_format=torch.channels_last)
        torch.set_num_threads(1)
        expected = group_norm_silu(x, 8)
        for threads in (2, 3, 4) * 10:  # one team, which meets between statistics and result
            torch.set_num_threads(threads)
            assert torch.equal(group_norm_silu(x, 8), expected), (shape, threads)
"""


@pytest.mark.skipif(extension.native is None, reason=str(extension.missing))
def test_every_number_of_threads_gives_the_same_bits() -> None:
    done = subprocess.run([sys.executable, "-c", THREADS], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
