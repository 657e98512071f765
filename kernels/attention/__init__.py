"""Scaled dot-product attention over the positions of an image."""

from __future__ import annotations

import torch
from torch import Tensor

from idm_fast.kernels import check
from idm_fast.kernels.dispatch import ANY_FLOAT, FLOATS, Backend, Op
from idm_fast.kernels.interpreter import triton_condition

NAME = "attention"
MAX_TRITON_HEAD = 512
MAX_TRITON_STRIDE = 2**24
MAX_CUDA_HEAD = 512
CUDA_VECTOR = 8  # elements in the 16 bytes that are copied at a time


def attention(
    q: Tensor,  # [N, L, heads, d]
    k: Tensor,  # [N, S, heads, d]
    v: Tensor,  # [N, S, heads, d]
    *,
    scale: float | None = None,
    out: Tensor | None = None,  # [N, L, heads, d] contiguous
) -> Tensor:
    """softmax(q k^T * scale) v for each sample and head; ``scale`` is d**-0.5 by default.

    q, k and v may be views of one packed tensor: only their last dimension must be dense. The result is contiguous,
    of q's dtype. Softmax and sums run in float32 or better. No mask: every position sees every other.

    Raises ``ContractError`` for arguments outside the contract and ``BackendError`` where no backend can run.
    Source: Vaswani et al., "Attention Is All You Need", equation 1.
    """
    check.no_autograd(NAME, q, k, v, out)
    if q.dim() != 4:
        check.fail(NAME, "q", "4-dimensional", "[N, L, heads, d]", list(q.shape))
    check.floating(NAME, "q", q)
    n, length, heads, d = q.shape
    if k.dim() != 4:
        check.fail(NAME, "k", "4-dimensional", "[N, S, heads, d]", list(k.shape))
    check.shape_is(NAME, "k", k, "[N, S, heads, d]", (n, k.shape[1], heads, d))
    check.shape_is(NAME, "v", v, "of k's shape", k.shape)
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        check.last_dim_dense(NAME, name, tensor)
        check.dtype_in(NAME, name, tensor, (q.dtype,))
        check.device_is(NAME, name, tensor, q.device)
    if k.shape[1] == 0 or d == 0:
        check.fail(NAME, "k", "of at least one position and channel", "S >= 1 and d >= 1", list(k.shape))
    if out is not None:
        check.shape_is(NAME, "out", out, "of q's shape", q.shape)
        check.dtype_in(NAME, "out", out, (q.dtype,))
        check.device_is(NAME, "out", out, q.device)
        if not out.is_contiguous():
            check.fail(NAME, "out", "contiguous", "True", "False")
        for name, tensor in (("q", q), ("k", k), ("v", v)):
            check.apart(NAME, "out", out, name, tensor)
    if q.numel() == 0:
        return torch.empty((n, length, heads, d), dtype=q.dtype, device=q.device) if out is None else out
    result: Tensor = OP.run(q.device, q.dtype, q, k, v, d**-0.5 if scale is None else scale, out)
    return result


def _triton_limits(q: Tensor, k: Tensor, v: Tensor, scale: float, out: Tensor | None) -> str | None:
    if q.shape[-1] > MAX_TRITON_HEAD:
        return f"takes heads of width <= {MAX_TRITON_HEAD}, not {q.shape[-1]}"
    if max(k.stride(1), v.stride(1)) > MAX_TRITON_STRIDE:  # offsets inside a tile are 32 bits wide
        return f"takes positions at most {MAX_TRITON_STRIDE} elements apart, not {max(k.stride(1), v.stride(1))}"
    return None


def _cuda_limits(q: Tensor, k: Tensor, v: Tensor, scale: float, out: Tensor | None) -> str | None:
    d = q.shape[-1]
    if d > MAX_CUDA_HEAD or d % CUDA_VECTOR:
        return f"takes heads of width <= {MAX_CUDA_HEAD} and a multiple of {CUDA_VECTOR}, not {d}"
    return _unaligned(q, k, v)


def _xformers_limits(q: Tensor, k: Tensor, v: Tensor, scale: float, out: Tensor | None) -> str | None:
    """What all of its kernels take: where none takes a call it raises, and torch, the next row, would not run."""
    if q.shape[-1] % CUDA_VECTOR:
        return f"takes heads of a width that is a multiple of {CUDA_VECTOR}, not {q.shape[-1]}"
    if not scale > 0:  # the highest product is the highest score for these only
        return f"takes scales above 0, not {scale}"
    return _unaligned(q, k, v)


def _unaligned(*tensors: Tensor) -> str | None:
    for tensor in tensors:
        whole = all(s % CUDA_VECTOR == 0 for s, n in zip(tensor.stride()[:3], tensor.shape[:3], strict=True) if n > 1)
        if not whole or tensor.data_ptr() % 16:
            return "takes rows aligned to 16 bytes"
    return None


OP = Op(
    NAME,
    "softmax(q k^T * scale) v",
    [
        Backend(
            "triton",
            f"{__name__}.triton_kernel:attention",
            frozenset({"cuda", "cpu"}),
            FLOATS,
            min_capability=(8, 0),
            limits=_triton_limits,
            condition=triton_condition,
        ),
        Backend(
            "cuda",
            f"{__name__}.cuda:attention",
            frozenset({"cuda"}),
            frozenset({torch.bfloat16, torch.float16}),
            min_capability=(8, 0),
            limits=_cuda_limits,
        ),
        Backend("cpu", f"{__name__}.native:attention", frozenset({"cpu"}), FLOATS),
        Backend(
            "xformers",
            f"{__name__}.xformers_backend:attention",
            frozenset({"cuda"}),
            FLOATS,
            limits=_xformers_limits,
        ),
        Backend("torch", f"{__name__}.torch_backend:attention", frozenset({"cpu", "cuda"}), ANY_FLOAT),
        Backend("reference", f"{__name__}.reference:attention", frozenset({"cpu", "cuda"}), ANY_FLOAT),
    ],
)
