"""What every block of a network adds for every step of a walk, in one call."""

from __future__ import annotations

import torch
from torch import Tensor

from idm_fast.kernels import check
from idm_fast.kernels.dispatch import ANY_FLOAT, FLOATS, Backend, Op
from idm_fast.kernels.interpreter import triton_condition

NAME = "time_embedding"
ORDERS = ("cos_sin", "sin_cos")


def time_embedding(
    t: Tensor,  # [T] float32, the network's own time
    weight1: Tensor,  # [hidden, features]
    bias1: Tensor | None,  # [hidden]
    weight2: Tensor,  # [width, hidden]
    bias2: Tensor | None,  # [width]
    weight: Tensor,  # [S, width], the projections of all blocks one below the other
    bias: Tensor | None,  # [S]
    *,
    order: str = "cos_sin",
    label: Tensor | None = None,  # [T, width] or [1, width], the embedding of a class
    embed_silu: bool = True,
    dtype: torch.dtype | None = None,
    out: Tensor | None = None,  # [T, S]
) -> Tensor:
    """e = weight2 silu(weight1 sinusoid(t) + bias1) + bias2 + label;  table = weight silu(e) + bias: [T, S].

    sinusoid(t) [T, features] holds cos and sin of t x 10000^(-i / (features / 2)), halves in ``order``. Without
    ``embed_silu`` the projection takes e itself. A block's row is a slice of the table's row, in the order of
    ``weight``. ``dtype`` of the table: float32 or that of ``weight`` (None). Weights and biases are of one dtype.

    Everything between is float32, whatever the weights' dtype: a noise level near 1 differs from its neighbours in
    digits that half precision has not got.

    Raises ``ContractError`` for arguments outside the contract and ``BackendError`` where no backend can run.
    Sources: DDPM (arXiv 2006.11239) for the sinusoid; SR3 (2104.07636) projects without the last SiLU.
    """
    check.no_autograd(NAME, t, weight1, bias1, weight2, bias2, weight, bias, label, out)
    if t.dim() != 1:
        check.fail(NAME, "t", "1-dimensional", "[T]", list(t.shape))
    check.dtype_in(NAME, "t", t, (torch.float32,))
    if order not in ORDERS:
        check.fail(NAME, "order", "one of", " or ".join(ORDERS), repr(order))
    width, sums = _matrices(t, weight1, weight2, weight)
    for name, vector, size in (("bias1", bias1, len(weight1)), ("bias2", bias2, width), ("bias", bias, sums)):
        if vector is not None:
            check.shape_is(NAME, name, vector, "of its weight's rows", (size,))
            _dense(name, vector, weight)
    if label is not None:
        rows = 1 if label.shape[:1] == (1,) else len(t)
        check.shape_is(NAME, "label", label, "[T or 1, width]", (rows, width))
        _dense("label", label, weight)
    dtype = dtype or weight.dtype
    if dtype not in (torch.float32, weight.dtype):
        check.fail(NAME, "dtype", "that of the table", f"torch.float32 or {weight.dtype}", dtype)
    if out is None:
        out = torch.empty(len(t), sums, dtype=dtype, device=t.device)
    else:
        check.shape_is(NAME, "out", out, "[T, S]", (len(t), sums))
        check.dtype_in(NAME, "out", out, (dtype,))
        check.device_is(NAME, "out", out, t.device)
        _contiguous("out", out)
        read = {"t": t, "weight1": weight1, "weight2": weight2, "weight": weight}
        optional = {"bias1": bias1, "bias2": bias2, "bias": bias, "label": label}
        read |= {name: tensor for name, tensor in optional.items() if tensor is not None}
        check.all_apart(NAME, {"out": out}, read)
    if out.numel():
        first = order == "cos_sin"
        arguments = (t, weight1, bias1, weight2, bias2, weight, bias, first, label, embed_silu, out)
        OP.run(t.device, weight.dtype, *arguments)
    return out


def _matrices(t: Tensor, weight1: Tensor, weight2: Tensor, weight: Tensor) -> tuple[int, int]:
    """Checks the three; returns (width, S)."""
    check.floating(NAME, "weight", weight)
    for name, matrix in (("weight1", weight1), ("weight2", weight2), ("weight", weight)):
        if matrix.dim() != 2 or 0 in matrix.shape:
            check.fail(NAME, name, "2-dimensional", "[out, in], neither 0", list(matrix.shape))
        _dense(name, matrix, weight)
        check.device_is(NAME, name, matrix, t.device)
    if weight1.shape[1] % 2:
        check.fail(NAME, "weight1", "[hidden, features] with half cosines, half sines", "even", weight1.shape[1])
    check.shape_is(NAME, "weight2", weight2, "[width, hidden]", (weight2.shape[0], weight1.shape[0]))
    check.shape_is(NAME, "weight", weight, "[S, width]", (weight.shape[0], weight2.shape[0]))
    return weight2.shape[0], weight.shape[0]


def _dense(name: str, tensor: Tensor, weight: Tensor) -> None:
    check.dtype_in(NAME, name, tensor, (weight.dtype,))
    check.device_is(NAME, name, tensor, weight.device)
    _contiguous(name, tensor)


def _contiguous(name: str, tensor: Tensor) -> None:
    if not tensor.is_contiguous():
        check.fail(NAME, name, "contiguous", "dense rows", f"strides {list(tensor.stride())}")


OP = Op(
    NAME,
    "weight silu(weight2 silu(weight1 sinusoid(t) + bias1) + bias2 + label) + bias",
    [
        Backend(
            "triton",
            f"{__name__}.triton_kernel:time_embedding",
            frozenset({"cuda", "cpu"}),
            FLOATS,
            min_capability=(8, 0),
            condition=triton_condition,
        ),
        # On a CPU two thirds of it are torch's three products, and a walk has one call: figures in kernels/README.md.
        Backend("torch", f"{__name__}.torch_backend:time_embedding", frozenset({"cpu", "cuda"}), ANY_FLOAT),
        Backend("reference", f"{__name__}.reference:time_embedding", frozenset({"cpu", "cuda"}), ANY_FLOAT),
    ],
)
