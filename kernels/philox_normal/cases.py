"""Inputs of philox_normal."""

from __future__ import annotations

import math

import torch
from torch import Generator, Tensor

from idm_fast.kernels.case import Case, Inputs, Outputs, Suite
from idm_fast.kernels.philox_normal import philox_normal
from idm_fast.kernels.philox_normal.reference import philox_normal as reference


def case(
    name: str,
    why: str,
    shape: tuple[int, int, int, int],
    step: int = -1,
    seeds: tuple[int, ...] | None = None,
    layer: bool = False,
) -> Case:
    elements = math.prod(shape)

    def make(dtype: torch.dtype, generator: Generator) -> Inputs:
        values = seeds or [17 * i + 3 for i in range(shape[0])]
        return {"seeds": torch.tensor(values, dtype=torch.int64), "shape": shape, "step": step}

    return Case(name, why, make, lambda dtype: 4 * elements, 45 * elements, layer)


CASES = [
    case("initial_128", "idm-128: the noise a chain begins with", (1, 3, 128, 128), layer=True),
    case("initial_128_b16", "idm-128: a batch of faces", (16, 3, 128, 128), layer=True),
    case("step", "the noise of a step", (2, 3, 32, 32), step=999),
    case("odd", "75 elements: the last counter is cut short", (3, 3, 5, 5), step=0),
    case("tiny", "one element an image", (2, 1, 1, 1)),
    case("last_step", "the largest counter", (1, 4, 8, 8), step=2**32 - 2),
    case("seed_bits", "all 64 bits of a seed count", (4, 3, 8, 8), seeds=(-1, 2**40 + 1, 1, -(2**63))),
]


def call(inputs: Inputs) -> Outputs:
    return {"noise": philox_normal(**inputs)}


def exact(inputs: Inputs) -> Outputs:
    return {"noise": reference(**inputs, dtype=torch.float64)}


def eager(inputs: Inputs) -> Tensor:
    """What one writes without counters: torch's own generator."""
    return torch.randn(inputs["shape"], device=inputs["seeds"].device)


SUITE = Suite(CASES, (torch.float32,), philox_normal, call, exact, eager)
