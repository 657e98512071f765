"""What every engine asks of those who use it, in the words of ``IdmFastError``."""

from __future__ import annotations

import torch
from torch import Tensor

from idm_fast.engine.buffers import Arena
from idm_fast.engine.weights import PackedWeights
from idm_fast.errors import IdmFastError
from idm_fast.kernels.extension import native


def instruction_set() -> str:
    """In whose order weights are packed."""
    return "none" if native is None else str(native.cpu_isa())


def check_instruction_set(who: str, compiled: str) -> None:
    if compiled != instruction_set():
        raise IdmFastError(f"{who}: instruction set must be that of compile = {compiled}, got {instruction_set()}")


def check_shape(who: str, shape: tuple[int, int, int], multiple: int) -> None:
    _, height, width = shape
    if min(shape) < 1 or height % multiple or width % multiple:
        raise IdmFastError(
            f"{who}: shape must be (N, H, W) with N >= 1 and H and W multiples of {multiple}, got {tuple(shape)}"
        )


def check_shared(
    who: str,
    weights: PackedWeights | None,
    arena: Arena | None,
    config: object,
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    """What is shared must be of the same kind."""
    if weights is not None and not ((weights.config, weights.dtype) == (config, dtype) and _at(weights.device, device)):
        raise IdmFastError(
            f"{who}: weights must be of the model's configuration in {dtype} on {device}, got {weights.dtype} on "
            f"{weights.device}{'' if weights.config == config else ' of another configuration'}"
        )
    if arena is not None and not _at(arena.device, device):
        raise IdmFastError(f"{who}: arena must be on {device}, got {arena.device}")


def check_same(who: str, name: str, given: Tensor, expected: Tensor) -> None:
    """``given`` can be copied to ``expected``."""
    if given.shape != expected.shape or given.is_floating_point() != expected.is_floating_point():
        raise IdmFastError(
            f"{who}: {name} must be {'float' if expected.is_floating_point() else 'int64'} {list(expected.shape)}, "
            f"got {given.dtype} {list(given.shape)}"
        )


def _at(place: torch.device, other: torch.device) -> bool:
    """ "cuda" is taken for "cuda:0"."""
    return (place.type, place.index or 0) == (other.type, other.index or 0)
