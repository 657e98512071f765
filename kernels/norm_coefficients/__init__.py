"""Statistics of channels -> the coefficients of a group norm: what the prologue of a convolution reads."""

from __future__ import annotations

import torch
from torch import Tensor

from idm_fast.kernels import check
from idm_fast.kernels.channel_stats import ChannelStats, check_stats
from idm_fast.kernels.dispatch import FLOATS, Backend, Op
from idm_fast.kernels.interpreter import triton_condition

NAME = "norm_coefficients"


def norm_coefficients(
    stats: ChannelStats,  # of x [N, C1, H, W]
    num_groups: int,
    weight: Tensor | None = None,  # [C]
    bias: Tensor | None = None,  # [C]
    *,
    eps: float = 1e-5,
    scale: Tensor | None = None,  # [N, C]
    shift: Tensor | None = None,  # [N, C]
    skip_stats: ChannelStats | None = None,  # of skip [N, C2, H, W]
    out: Tensor | None = None,  # float32 [N, 3, C]
) -> Tensor:
    """Rows (centre, gain, offset) such that group_norm(x) * (1 + scale) + shift = (x - centre) * gain + offset.

    With ``skip_stats`` they are those of torch.cat([x, skip], 1), C = C1 + C2: groups may straddle the seam. The two
    may be cut into different pieces of the same H * W positions. ``weight``, ``bias``, ``scale`` and ``shift`` are as
    in ``group_norm_silu``, each of any of float32, bfloat16 and float16. ``centre`` is the group's mean, rounded;
    ``offset`` makes up for the rounding. Returns float32 [N, 3, C].

    Raises ``ContractError`` for arguments outside the contract and ``BackendError`` where no backend can run.
    Source: Wu & He, "Group Normalization", ECCV 2018; Chan, Golub & LeVeque 1983 for the merging.
    """
    check_stats(NAME, "stats", stats)
    n, _, _, c = stats.partials.shape
    device = stats.partials.device
    if skip_stats is not None:
        check_stats(NAME, "skip_stats", skip_stats)
        check.device_is(NAME, "skip_stats.partials", skip_stats.partials, device)
        if skip_stats.partials.shape[0] != n:
            check.fail(NAME, "skip_stats", "of as many samples as stats", n, skip_stats.partials.shape[0])
        c += skip_stats.partials.shape[3]
    check_affine(NAME, device, (n, c), num_groups, weight, bias, scale, shift, tuple(FLOATS))
    if out is not None:
        check.no_autograd(NAME, out)
        check.shape_is(NAME, "out", out, "[N, 3, C]", (n, 3, c))
        check.dtype_in(NAME, "out", out, (torch.float32,))
        check.device_is(NAME, "out", out, device)
        if not out.is_contiguous():
            check.fail(NAME, "out", "contiguous", "dense strides", f"strides {list(out.stride())}")
        read = {"stats.partials": stats.partials, "stats.counts": stats.counts}
        if skip_stats is not None:
            read |= {"skip_stats.partials": skip_stats.partials, "skip_stats.counts": skip_stats.counts}
        read |= {"weight": weight} if weight is not None else {}
        read |= {"bias": bias} if bias is not None else {}
        read |= {"scale": scale, "shift": shift} if scale is not None and shift is not None else {}
        check.all_apart(NAME, {"out": out}, read)
    else:
        out = torch.empty((n, 3, c), dtype=torch.float32, device=device)
    if n == 0:
        return out
    OP.run(device, torch.float32, stats, num_groups, weight, bias, eps, scale, shift, skip_stats, out)
    return out


def check_affine(
    op: str,
    device: torch.device,
    shape: tuple[int, int],  # N, C
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    dtypes: tuple[torch.dtype, ...],
) -> None:
    """The contract of the groups and parameters of a group norm."""
    check.no_autograd(op, weight, bias, scale, shift)
    n, c = shape
    if not check.is_index(num_groups) or num_groups < 1 or c < 1 or c % num_groups:
        check.fail(op, "num_groups", "a divisor of C", f"divisor of {c}", num_groups)
    if weight is not None:
        _parameter(op, "weight", weight, "[C]", (c,), dtypes, device)
    if bias is not None:
        _parameter(op, "bias", bias, "[C]", (c,), dtypes, device)
    if scale is not None and shift is not None:
        _parameter(op, "scale", scale, "[N, C]", (n, c), dtypes, device)
        _parameter(op, "shift", shift, "[N, C]", (n, c), dtypes, device)
    elif scale is not None or shift is not None:
        check.fail(op, "scale and shift", "given together", "both or none", "one of them")


def _parameter(
    op: str,
    name: str,
    value: Tensor,
    contract: str,
    shape: tuple[int, ...],
    dtypes: tuple[torch.dtype, ...],
    device: torch.device,
) -> None:
    check.shape_is(op, name, value, contract, shape)
    if value.dtype not in dtypes:
        check.dtype_in(op, name, value, dtypes)
    check.device_is(op, name, value, device)
    check.last_dim_dense(op, name, value)


OP = Op(
    NAME,
    "(centre, gain, offset) of group_norm(x) * (1 + scale) + shift",
    [
        Backend(
            "triton",
            f"{__name__}.triton_kernel:norm_coefficients",
            frozenset({"cuda", "cpu"}),
            FLOATS,
            min_capability=(8, 0),
            condition=triton_condition,
        ),
        Backend("cuda", f"{__name__}.cuda:norm_coefficients", frozenset({"cuda"}), FLOATS, min_capability=(8, 0)),
        Backend("cpu", f"{__name__}.native:norm_coefficients", frozenset({"cpu"}), FLOATS),
        Backend(
            "torch",
            f"{__name__}.torch_backend:norm_coefficients",
            frozenset({"cpu", "cuda"}),
            FLOATS,
        ),
        Backend(
            "reference",
            f"{__name__}.reference:norm_coefficients",
            frozenset({"cpu", "cuda"}),
            FLOATS,
        ),
    ],
)
