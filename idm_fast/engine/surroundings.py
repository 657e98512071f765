"""What callers set for torch code of their own, and a plan must not see."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")
DEVICES = ("cpu", "cuda")


def shielded(function: Callable[P, R]) -> Callable[P, R]:
    """``function`` without gradients, inference mode and autocast, whatever it is called under.

    Memory that is written again must not be made of inference tensors; autocast would round the time embedding, and
    every product of the torch back ends.
    """

    @wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        before = [torch.is_autocast_enabled(device) for device in DEVICES]
        try:
            for device in DEVICES:
                torch.set_autocast_enabled(device, False)
            with torch.inference_mode(False), torch.no_grad():
                return function(*args, **kwargs)
        finally:
            for device, enabled in zip(DEVICES, before, strict=True):
                torch.set_autocast_enabled(device, enabled)

    return run
