"""Contract checks in Python, before any backend runs. Every message has one form:

``<op>: <argument> must be <contract> = <expected>, got <actual>``
"""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor


class ContractError(ValueError):
    """An argument breaks the contract of an operation. Nothing was computed or written."""


def fail(op: str, argument: str, contract: str, expected: object, actual: object) -> NoReturn:
    raise ContractError(f"{op}: {argument} must be {contract} = {expected}, got {actual}")


def shape_is(op: str, argument: str, tensor: Tensor, contract: str, expected: tuple[int, ...]) -> None:
    if tensor.shape != expected:
        fail(op, argument, contract, list(expected), list(tensor.shape))


def device_is(op: str, argument: str, tensor: Tensor, device: torch.device) -> None:
    if tensor.device != device:
        fail(op, argument, "on the device of the first tensor", device, tensor.device)


def dtype_in(op: str, argument: str, tensor: Tensor, allowed: tuple[torch.dtype, ...]) -> None:
    if tensor.dtype not in allowed:
        fail(op, argument, "of dtype", " or ".join(map(_name, dict.fromkeys(allowed))), _name(tensor.dtype))


def is_index(value: object) -> bool:
    """Whether a number counts something: int and what stands for one (numpy's), not bool or float."""
    return hasattr(value, "__index__") and not isinstance(value, bool)


def floating(op: str, argument: str, tensor: Tensor) -> None:
    if not tensor.is_floating_point():
        fail(op, argument, "of a float dtype", "float32, bfloat16 or float16", _name(tensor.dtype))


def is_nhwc(tensor: Tensor) -> bool:
    """Whether an [N, C, H, W] tensor lies densely in NHWC order (dimensions of size 1 say nothing)."""
    _, c, h, w = tensor.shape
    if tensor.stride() == (h * w * c, 1, w * c, c):  # the common case, several times faster to ask
        return True
    return tensor.is_contiguous(memory_format=torch.channels_last)


def nhwc(op: str, argument: str, tensor: Tensor) -> None:
    if not is_nhwc(tensor):
        _, c, h, w = tensor.shape
        expected = f"strides {[h * w * c, 1, w * c, c]}"
        fail(op, argument, "in torch.channels_last format", expected, f"strides {list(tensor.stride())}")


def last_dim_dense(op: str, argument: str, tensor: Tensor) -> None:
    if tensor.stride()[-1] != 1 and tensor.shape[-1] > 1:
        fail(op, argument, "dense in its last dimension", "stride 1", f"stride {tensor.stride(-1)}")


def no_autograd(op: str, *tensors: Tensor | None) -> None:
    """The fused operations have no backward: refuse rather than drop a gradient."""
    if not torch.is_grad_enabled():
        return
    for tensor in tensors:
        if tensor is not None and tensor.requires_grad:
            raise ContractError(
                f"{op}: no input must require grad = False, got True; use the torch modules for training,"
                " or run under torch.no_grad()"
            )


def apart(op: str, argument: str, tensor: Tensor, other_name: str, other: Tensor, *, same_ok: bool = False) -> None:
    """``tensor``, which is written, must not share memory with ``other`` (with ``same_ok`` it may be it exactly)."""
    begin, end = extent(tensor)
    other_begin, other_end = extent(other)
    if begin >= other_end or other_begin >= end:
        return
    if same_ok and begin == other_begin and tensor.stride() == other.stride() and tensor.dtype == other.dtype:
        return
    _overlap(op, argument, f"{other_name} itself or apart from it" if same_ok else f"apart from {other_name}")


def all_apart(op: str, written: dict[str, Tensor], read: dict[str, Tensor]) -> None:
    """No tensor of ``written`` may share memory with itself, another of ``written`` or one of ``read``."""
    others = [(name, *extent(tensor)) for name, tensor in read.items()]
    for name, tensor in written.items():
        if 0 in tensor.stride() and any(s == 0 < n - 1 for s, n in zip(tensor.stride(), tensor.shape, strict=True)):
            _overlap(op, name, "expanded in no dimension")
        begin, end = extent(tensor)
        for other_name, other_begin, other_end in others:
            if begin < other_end and other_begin < end:
                _overlap(op, name, f"apart from {other_name}")
        others.append((name, begin, end))


def _overlap(op: str, argument: str, contract: str) -> NoReturn:
    fail(op, argument, contract, "no overlap", "overlapping memory")


def extent(tensor: Tensor) -> tuple[int, int]:
    """The addresses that a tensor's elements lie between; with gaps it is all of what lies in them too."""
    begin = tensor.data_ptr()
    if tensor.is_contiguous() or (tensor.dim() == 4 and is_nhwc(tensor)):
        return begin, begin + tensor.nbytes
    if tensor.numel() == 0:
        return begin, begin
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return begin, begin + (last + 1) * tensor.element_size()


def _name(value: Any) -> str:
    return str(value).removeprefix("torch.")
