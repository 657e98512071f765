"""``Case``: one set of inputs that tests and benchmarks share, with the reason for it beside it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Inputs = dict[str, Any]  # keyword arguments of the public function: tensors, tuples of tensors, plain values
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
    timed_only: bool = False  # too large for the tests, which run every other case in every way

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

    @property
    def tested(self) -> list[Case]:
        return [case for case in self.cases if not case.timed_only]


def verdict(out: Outputs, exact: Outputs, plain: Outputs, ulps: float = 0.0) -> str | None:
    """What is wrong with ``out``, or None.

    The rule: max|out - exact| <= 2 * max|plain - exact| + eps, where ``plain`` is torch's result in the same dtype and
    eps that dtype's, times the largest value. ``ulps`` more of those are allowed on top.
    """
    for key, expected in exact.items():
        if out[key].shape != expected.shape:
            return f"{key}: shape {list(out[key].shape)}, not {list(expected.shape)}"
        value, reference = out[key].double(), expected.double()
        if not value.isfinite().all():
            return f"{key}: an element is not finite, or was never written"
        eps = torch.finfo(out[key].dtype).eps * max(1.0, reference.abs().max().item())
        error = (value - reference).abs().max().item()
        allowed = 2 * (plain[key].double() - reference).abs().max().item() + (1 + ulps) * eps
        if not error <= allowed:
            return f"{key}: error {error:.3e}, allowed {allowed:.3e}"
    return None


def each_tensor(change: Callable[[Tensor], Tensor], value: Any) -> Any:
    """``value`` with every tensor in it changed; a NamedTuple of tensors keeps its type."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(each_tensor(change, item) for item in value))
    return value


def to_device(value: Any, device: str | torch.device) -> Any:
    """Moves a tensor and keeps its strides (``Tensor.to`` keeps them for dense tensors only)."""

    def moved(tensor: Tensor) -> Tensor:
        if tensor.device == torch.device(device) or tensor.to(device).stride() == tensor.stride():
            return tensor.to(device)
        return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device).copy_(tensor)

    return each_tensor(moved, value)


def poison(like: Tensor) -> Tensor:
    """A tensor of the same layout full of NaN: an element that a kernel forgets to write is seen."""
    return torch.full_like(like, float("nan"))


def to_float64(inputs: Inputs) -> Inputs:
    def change(tensor: Tensor) -> Tensor:
        return tensor.double() if tensor.is_floating_point() else tensor

    return {key: each_tensor(change, value) for key, value in inputs.items()}


def element_size(dtype: torch.dtype) -> int:
    return torch.empty((), dtype=dtype).element_size()
