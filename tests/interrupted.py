"""Training runs that are stopped in the middle, and what they leave: what the tests of all trainers share."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor


def stop_at(run: Any, step: int) -> None:
    """Runs a trainer until Ctrl-C comes at the beginning of ``step``."""
    own = run._step

    def stopped(*batch: Tensor) -> dict[str, float]:
        if run.step == step:
            raise KeyboardInterrupt
        figures: dict[str, float] = own(*batch)
        return figures

    run._step = stopped
    with pytest.raises(KeyboardInterrupt):
        run.run()
    torch.manual_seed(99)  # states of the process must not matter to the run that goes on


def tensors(state: Any, name: str = "") -> dict[str, Tensor]:
    """All tensors in a tree of dictionaries, by their paths in it."""
    if isinstance(state, dict):
        return {k: v for key, item in state.items() for k, v in tensors(item, f"{name}.{key}").items()}
    return {name: state} if isinstance(state, Tensor) else {}
