"""The attention block of a U-Net in three operations, with nothing between them."""

from __future__ import annotations

from typing import Literal, overload

from torch import Tensor

from idm_fast.kernels import check
from idm_fast.kernels.attention import attention
from idm_fast.kernels.channel_stats import ChannelStats
from idm_fast.kernels.conv2d import conv2d

NAME = "attention_block"
Order = Literal["qkv_heads", "heads_qkv"]


# fmt: off
@overload
def attention_block(
    x: Tensor, coefficients: Tensor | None, qkv_weight: Tensor, qkv_bias: Tensor | None, out_weight: Tensor,
    out_bias: Tensor | None, *, heads: int, order: Order, with_stats: Literal[False] = False, out: Tensor | None = None,
) -> Tensor: ...
@overload
def attention_block(
    x: Tensor, coefficients: Tensor | None, qkv_weight: Tensor, qkv_bias: Tensor | None, out_weight: Tensor,
    out_bias: Tensor | None, *, heads: int, order: Order, with_stats: Literal[True], out: Tensor | None = None,
) -> tuple[Tensor, ChannelStats]: ...
# fmt: on
def attention_block(
    x: Tensor,  # [N, C, H, W] channels_last
    coefficients: Tensor | None,  # [N, 3, C] float32, from norm_coefficients
    qkv_weight: Tensor,  # [3 C, C, 1, 1]
    qkv_bias: Tensor | None,  # [3 C]
    out_weight: Tensor,  # [C, C, 1, 1]
    out_bias: Tensor | None,  # [C]
    *,
    heads: int,
    order: Order,
    with_stats: bool = False,
    out: Tensor | None = None,  # as x, apart from it
) -> Tensor | tuple[Tensor, ChannelStats]:
    """x + out_weight @ attention(qkv_weight @ ((x - centre) * gain + offset) + qkv_bias) + out_bias.

    The norm is the projection's prologue, the sum with x the epilogue of the last one; q, k and v are never apart.
    ``order`` of the 3 C channels: "qkv_heads" is [3][heads][C / heads], "heads_qkv" is [heads][3][C / heads]
    (guided-diffusion's older one). ``with_stats``: also the ``ChannelStats`` of the result. Backends are those of
    ``conv2d`` and ``attention``, chosen for each by itself.

    Raises ``ContractError`` for arguments outside the contract and ``BackendError`` where no backend can run.
    """
    if x.dim() != 4:
        check.fail(NAME, "x", "4-dimensional", "[N, C, H, W]", list(x.shape))
    n, c, h, w = x.shape
    if heads < 1 or c % heads:
        check.fail(NAME, "heads", "a divisor of C", f"divisor of {c}", heads)
    if order not in ("qkv_heads", "heads_qkv"):
        check.fail(NAME, "order", "one of", "qkv_heads, heads_qkv", order)
    check.shape_is(NAME, "qkv_weight", qkv_weight, "[3 C, C, 1, 1]", (3 * c, c, 1, 1))
    check.shape_is(NAME, "out_weight", out_weight, "[C, C, 1, 1]", (c, c, 1, 1))
    packed = conv2d(x, qkv_weight, qkv_bias, coefficients=coefficients).permute(0, 2, 3, 1)
    if order == "qkv_heads":
        q, k, v = packed.reshape(n, h * w, 3, heads, c // heads).unbind(2)
    else:
        q, k, v = packed.reshape(n, h * w, heads, 3, c // heads).unbind(3)
    mixed = attention(q, k, v).view(n, h, w, c).permute(0, 3, 1, 2)
    if with_stats:
        return conv2d(mixed, out_weight, out_bias, residual=x, with_stats=True, out=out)
    return conv2d(mixed, out_weight, out_bias, residual=x, out=out)
