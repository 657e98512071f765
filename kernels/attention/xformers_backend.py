"""xformers' memory_efficient_attention, which picks among its own kernels; a competitor where it is installed."""

from __future__ import annotations

from torch import Tensor

try:
    from xformers.ops import memory_efficient_attention
except ImportError as error:
    raise ImportError(f"xformers is not installed ({error})") from error


def attention(
    q: Tensor,  # [N, L, heads, d]
    k: Tensor,  # [N, S, heads, d]
    v: Tensor,  # [N, S, heads, d]
    scale: float,
    out: Tensor | None,
) -> Tensor:
    y: Tensor = memory_efficient_attention(q, k, v, scale=scale)
    return y.contiguous() if out is None else out.copy_(y)
