"""Devices and number formats: their names, and which a machine does best."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from idm_fast.engine.lossy import TIERS, why_not
from idm_fast.engine.nodes import EightBit, Value
from idm_fast.errors import IdmFastError

if TYPE_CHECKING:
    from idm_fast.engine.bind import BoundNode

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def default_dtype(device: torch.device) -> torch.dtype:
    """fp16 on CUDA, bf16 on a CPU with bf16 instructions, else fp32."""
    if device.type == "cuda":
        return torch.float16
    supported = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
    return torch.bfloat16 if device.type == "cpu" and supported is not None and supported() else torch.float32


def chosen_device(name: torch.device | str | None) -> torch.device:
    """None: CUDA where there is one. Raises ``IdmFastError`` for one that is unknown or not here."""
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError as error:
        raise IdmFastError(f"device must be cpu, cuda or cuda:N, got {name!r}: {error}".splitlines()[0]) from None
    count = torch.cuda.device_count()
    if device.type not in ("cpu", "cuda") or (device.type == "cuda" and (device.index or 0) >= count):
        here = ["cpu", *(f"cuda:{i}" for i in range(count))]
        raise IdmFastError(f"device must be one of this machine's = {', '.join(here)}, got {device}")
    return device


def chosen_dtype(
    dtype: torch.dtype | str | None, device: torch.device, backend: str | None = None
) -> tuple[torch.dtype, EightBit | None]:
    """(type of images and weights, what convolutions behind a norm are quantised to) for a name, a torch type or None.

    int8 (CPU) and fp8 (sm_90) are lossy: between the convolutions the type is the device's default. ``backend``: one
    that is forced; on a CPU it imitates fp8, to judge it. Raises ``IdmFastError`` for a dtype that is unknown or that
    the device has not got.
    """
    if dtype is None:
        return default_dtype(device), None
    for tier in TIERS:
        if dtype == tier:
            lacking = why_not(tier, device, backend)
            if lacking is not None:
                raise IdmFastError(f"dtype must be one that the device has: {lacking}")
            return default_dtype(device), tier
    found = DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if found is None or found not in DTYPES.values():
        raise IdmFastError(f"dtype must be one of {', '.join([*DTYPES, *TIERS])}, got {dtype!r}")
    if device.type == "cpu" and found == torch.float16:
        raise IdmFastError("dtype must be fp32, bf16 or int8 on a CPU, got fp16")
    return found, None


FP16_RANGE = 6e4  # float16 ends at 65504; what another picture adds must fit between


@torch.no_grad()
def check_range(calls: Sequence[BoundNode], tensors: Mapping[Value, Tensor]) -> None:
    """Runs the calls in order and looks at every float16 image that they store, once.

    Raises ``IdmFastError`` naming the first layer whose values leave the range, with bf16 as the way out.
    """
    layers, most = [], []
    for bound in calls:
        bound.call()
        for value in bound.node.writes:
            if isinstance(value, Value) and value.dtype == torch.float16:
                layers.append(bound.node.layer)
                most.append(tensors[value].abs().amax().float())
    if not most:
        return
    for layer, seen in zip(layers, torch.stack(most).tolist(), strict=True):
        if not seen <= FP16_RANGE:  # neither is a NaN
            raise IdmFastError(f"fp16: values of {layer} must stay within +-{FP16_RANGE:g}, got {seen:g}; use bf16")
