"""Per-channel statistics of a tensor, in pieces that combine: the form in which every producer writes them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from idm_fast.kernels import check
from idm_fast.kernels.dispatch import ANY_FLOAT, FLOATS, Backend, Op
from idm_fast.kernels.interpreter import second_axis, triton_condition

NAME = "channel_stats"

MAX_PIECES = 128  # with two tiles of channels they fill 132 multiprocessors, and a consumer can still read them all
LEAST_ROWS = 64  # shorter pieces would make the partials more than a sixteenth of a 16-bit tensor


class ChannelStats(NamedTuple):
    """Statistics of an [N, C, H, W] tensor, from P pieces of its H * W positions, the same for all n and c.

    ``partials``: float32 [N, P, 2, C], contiguous; ``partials[n, p, 0, c]`` is the mean of piece p and
    ``partials[n, p, 1, c]`` the sum of squared differences from that mean (M2). ``counts``: float32 [P], positions in
    each piece, at least 1; they add up to H * W. Which positions a piece holds is the producer's affair. Pieces are
    merged in index order by Chan's formula, so a consumer gives the same bits every time.
    Source: Chan, Golub & LeVeque, "Algorithms for computing the sample variance", 1983.
    """

    partials: Tensor
    counts: Tensor


def channel_stats(
    x: Tensor,  # [N, C, H, W] channels_last
    *,
    out: ChannelStats | None = None,  # as made by empty_stats(x)
) -> ChannelStats:
    """Mean and M2 of every channel over pieces of ``piece_rows(H * W)`` positions in memory order, the last shorter.

    float32 or better inside: Welford / Chan, no sums of squares of values far from zero. A NaN stays in its channel.
    Raises ``ContractError`` for arguments outside the contract and ``BackendError`` where no backend can run.
    """
    check.no_autograd(NAME, x)
    if x.dim() != 4:
        check.fail(NAME, "x", "4-dimensional", "[N, C, H, W]", list(x.shape))
    check.floating(NAME, "x", x)
    check.nhwc(NAME, "x", x)
    if x.numel() == 0:
        check.fail(NAME, "x", "of at least one element", "N, C, H, W >= 1", list(x.shape))
    if out is None:
        out = empty_stats(x)
    else:
        check_stats(NAME, "out", out, x)
        rows = x.shape[2] * x.shape[3]
        check.shape_is(NAME, "out.counts", out.counts, "[P] of piece_rows", (pieces(rows),))
        check.all_apart(NAME, {"out.partials": out.partials, "out.counts": out.counts}, {"x": x})
    OP.run(x.device, x.dtype, x, out)
    return out


def piece_rows(rows: int) -> int:
    """Positions in a piece of ``channel_stats`` for a tensor of ``rows`` = H * W positions."""
    return max(LEAST_ROWS, -(-rows // (MAX_PIECES * LEAST_ROWS)) * LEAST_ROWS)


def pieces(rows: int) -> int:
    """P of ``channel_stats`` for a tensor of ``rows`` = H * W positions."""
    return -(-rows // piece_rows(rows))


def empty_stats(x: Tensor) -> ChannelStats:
    """Room for the statistics that ``channel_stats`` makes of ``x`` [N, C, H, W]."""
    n, c, h, w = x.shape
    count = pieces(h * w)
    work = torch.promote_types(x.dtype, torch.float32)
    return ChannelStats(
        torch.empty((n, count, 2, c), dtype=work, device=x.device), torch.empty(count, dtype=work, device=x.device)
    )


def combine(stats: ChannelStats) -> tuple[Tensor, Tensor]:
    """(mean, M2) [N, C] over all positions in float64, piece by piece in index order: for tests, not for speed."""
    partials, counts = stats.partials.double(), stats.counts.double()
    mean, m2, count = partials[:, 0, 0], partials[:, 0, 1], counts[0]
    for p in range(1, len(counts)):
        total = count + counts[p]
        delta = partials[:, p, 0] - mean
        mean = mean + delta * (counts[p] / total)
        m2 = m2 + partials[:, p, 1] + delta.square() * (count * counts[p] / total)
        count = total
    return mean, m2


def check_stats(op: str, argument: str, stats: ChannelStats, x: Tensor | None = None) -> None:
    """Refuses what is not ``ChannelStats``, or (where ``x`` is given) not of a tensor shaped like ``x``.

    That the counts add up to H * W is not asked: it would wait for the device.
    """
    if not isinstance(stats, ChannelStats):
        check.fail(op, argument, "what channel_stats returns", "ChannelStats", type(stats).__name__)
    partials, counts = stats
    check.no_autograd(op, partials, counts)
    if partials.dim() != 4 or partials.shape[1] < 1 or partials.shape[2] != 2:
        check.fail(
            op, f"{argument}.partials", "per piece, (mean, M2) and channel", "[N, P, 2, C]", list(partials.shape)
        )
    if x is not None:
        n, c = x.shape[0], x.shape[1]
        check.shape_is(op, f"{argument}.partials", partials, "[N, P, 2, C]", (n, partials.shape[1], 2, c))
        check.device_is(op, f"{argument}.partials", partials, x.device)
    check.shape_is(op, f"{argument}.counts", counts, "[P]", (partials.shape[1],))
    check.device_is(op, f"{argument}.counts", counts, partials.device)
    for name, tensor in zip(stats._fields, stats, strict=True):
        double = x is not None and x.dtype == torch.float64
        check.dtype_in(op, f"{argument}.{name}", tensor, (torch.float64 if double else torch.float32,))
        if not tensor.is_contiguous():
            check.fail(op, f"{argument}.{name}", "contiguous", "dense strides", f"strides {list(tensor.stride())}")


OP = Op(
    NAME,
    "per-channel (mean, sum of squared differences) of pieces",
    [
        Backend(
            "triton",
            f"{__name__}.triton_kernel:channel_stats",
            frozenset({"cuda", "cpu"}),
            FLOATS,
            min_capability=(8, 0),
            limits=second_axis,
            condition=triton_condition,
        ),
        Backend("cuda", f"{__name__}.cuda:channel_stats", frozenset({"cuda"}), FLOATS, min_capability=(8, 0)),
        Backend("cpu", f"{__name__}.native:channel_stats", frozenset({"cpu"}), FLOATS),
        Backend("torch", f"{__name__}.torch_backend:channel_stats", frozenset({"cpu", "cuda"}), ANY_FLOAT),
        Backend("reference", f"{__name__}.reference:channel_stats", frozenset({"cpu", "cuda"}), ANY_FLOAT),
    ],
)
