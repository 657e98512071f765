"""The nearest code of a codebook for each position of a latent image."""

from __future__ import annotations

import torch
from torch import Tensor

from idm_fast.kernels import check
from idm_fast.kernels.dispatch import ANY_FLOAT, FLOATS, Backend, Op
from idm_fast.kernels.interpreter import triton_condition

NAME = "vq_nearest"
MAX_TRITON_WIDTH = 512


def vq_nearest(
    z: Tensor,  # [N, D, H, W] channels_last
    codebook: Tensor,  # [K, D] contiguous
    *,
    out_codes: Tensor | None = None,  # int64 [N, H, W] contiguous
    out_quantised: Tensor | None = None,  # as z
) -> tuple[Tensor, Tensor]:
    """codes = argmin_k |z - codebook[k]|^2 at each position, and the codes' rows as an image.

    Returns (codes int64 [N, H, W], quantised [N, D, H, W] channels_last of z's dtype). The codebook is float32 or of
    z's dtype. Distances are |c|^2 - 2 z.c in float32 or better, never all at once in memory; of equal ones the lowest
    index is taken. A distance that is not a number is larger than all others, so a position with a NaN in it gets
    code 0, and a code with a NaN in it is chosen by no other position.

    Raises ``ContractError`` for arguments outside the contract and ``BackendError`` where no backend can run.
    Source: van den Oord et al., "Neural Discrete Representation Learning" (arXiv 1711.00937), equation 1.
    """
    check.no_autograd(NAME, z, codebook, out_quantised)
    if z.dim() != 4:
        check.fail(NAME, "z", "4-dimensional", "[N, D, H, W]", list(z.shape))
    check.floating(NAME, "z", z)
    check.nhwc(NAME, "z", z)
    n, d, h, w = z.shape
    if codebook.dim() != 2 or 0 in codebook.shape:
        check.fail(NAME, "codebook", "of at least one code and channel", "[K, D]", list(codebook.shape))
    check.shape_is(NAME, "codebook", codebook, "[K, D]", (codebook.shape[0], d))
    check.dtype_in(NAME, "codebook", codebook, (z.dtype, torch.float32))
    check.device_is(NAME, "codebook", codebook, z.device)
    if not codebook.is_contiguous():
        check.fail(NAME, "codebook", "contiguous", "True", "False")
    if out_codes is None:
        out_codes = torch.empty((n, h, w), dtype=torch.int64, device=z.device)
    else:
        check.shape_is(NAME, "out_codes", out_codes, "[N, H, W]", (n, h, w))
        check.dtype_in(NAME, "out_codes", out_codes, (torch.int64,))
        check.device_is(NAME, "out_codes", out_codes, z.device)
        if not out_codes.is_contiguous():
            check.fail(NAME, "out_codes", "contiguous", "True", "False")
    if out_quantised is None:
        out_quantised = torch.empty_like(z)
    else:
        check.shape_is(NAME, "out_quantised", out_quantised, "of z's shape", z.shape)
        check.dtype_in(NAME, "out_quantised", out_quantised, (z.dtype,))
        check.device_is(NAME, "out_quantised", out_quantised, z.device)
        check.nhwc(NAME, "out_quantised", out_quantised)
    written = {"out_codes": out_codes, "out_quantised": out_quantised}
    check.all_apart(NAME, written, {"z": z, "codebook": codebook})
    if z.numel() > 0:
        OP.run(z.device, z.dtype, z, codebook, out_codes, out_quantised)
    return out_codes, out_quantised


def positions(image: Tensor) -> Tensor:
    """[N, D, H, W] channels_last -> [N * H * W, D], the same memory."""
    n, d, h, w = image.shape
    return image.permute(0, 2, 3, 1).reshape(n * h * w, d)


def _triton_limits(z: Tensor, codebook: Tensor, codes: Tensor, quantised: Tensor) -> str | None:
    d = z.shape[1]
    return None if d <= MAX_TRITON_WIDTH else f"takes codes of at most {MAX_TRITON_WIDTH} channels, not {d}"


OP = Op(
    NAME,
    "argmin_k |z - codebook[k]|^2, and those codes' rows",
    [
        Backend(
            "triton",
            f"{__name__}.triton_kernel:vq_nearest",
            frozenset({"cuda", "cpu"}),
            FLOATS,
            min_capability=(8, 0),
            limits=_triton_limits,
            condition=triton_condition,
        ),
        Backend("cpu", f"{__name__}.native:vq_nearest", frozenset({"cpu"}), FLOATS),
        Backend("torch", f"{__name__}.torch_backend:vq_nearest", frozenset({"cpu", "cuda"}), ANY_FLOAT),
        Backend("reference", f"{__name__}.reference:vq_nearest", frozenset({"cpu", "cuda"}), ANY_FLOAT),
    ],
)
