"""``Case``: one set of inputs that tests and benchmarks share, with the reason for it beside it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Inputs = dict[str, Any]  # keyword arguments of the public function
Outputs = dict[str, Tensor]


@dataclass(frozen=True)
class Case:
    """Inputs of one operation. ``why`` names the layer of a real network, or what is awkward about the shape."""

    name: str
    why: str
    make: Callable[[torch.dtype, torch.Generator], Inputs]  # on the CPU; the same numbers for the same generator seed
    bytes_moved: Callable[[torch.dtype], int]  # least traffic: every input read once, every output written once
    flops: int = 0
    layer: bool = False  # a real layer: worth timing

    def inputs(self, dtype: torch.dtype, device: str | torch.device = "cpu", seed: int = 0) -> Inputs:
        made = self.make(dtype, torch.Generator().manual_seed(seed))
        return {key: to_device(value, device) for key, value in made.items()}


@dataclass(frozen=True)
class Suite:
    """How to run and judge one operation on its cases; each ``<op>/cases.py`` ends with one."""

    cases: list[Case]
    dtypes: tuple[torch.dtype, ...]
    function: Callable[..., Any]  # the public function: what is timed
    call: Callable[[Inputs], Outputs]  # the same on copies of what it overwrites, into NaN-poisoned outputs
    exact: Callable[[Inputs], Outputs]  # the float64 reference
    eager: Callable[[Inputs], Any]  # what one writes without this package: the peer to be timed against


def verdict(out: Outputs, exact: Outputs, plain: Outputs, ulps: float = 0.0) -> str | None:
    """What is wrong with ``out``, or None.

    The rule: max|out - exact| <= 2 * max|plain - exact| + eps, where ``plain`` is torch's result in the same dtype and
    eps that dtype's, times the largest value. ``ulps`` more of those are allowed on top.
    """
    for key, expected in exact.items():
        value, reference = out[key].double(), expected.double()
        if not value.isfinite().all():
            return f"{key}: an element is not finite, or was never written"
        eps = torch.finfo(out[key].dtype).eps * max(1.0, reference.abs().max().item())
        error = (value - reference).abs().max().item()
        allowed = 2 * (plain[key].double() - reference).abs().max().item() + (1 + ulps) * eps
        if not error <= allowed:
            return f"{key}: error {error:.3e}, allowed {allowed:.3e}"
    return None


def to_device(value: Any, device: str | torch.device) -> Any:
    """Moves a tensor and keeps its strides (``Tensor.to`` keeps them for dense tensors only)."""
    if not isinstance(value, Tensor):
        return value
    return value if value.device == torch.device(device) else value.to(device)


def poison(like: Tensor) -> Tensor:
    """A tensor of the same layout full of NaN: an element that a kernel forgets to write is seen."""
    return torch.full_like(like, float("nan"))


def to_float64(inputs: Inputs) -> Inputs:
    return {k: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in inputs.items()}


def element_size(dtype: torch.dtype) -> int:
    return torch.empty((), dtype=dtype).element_size()
