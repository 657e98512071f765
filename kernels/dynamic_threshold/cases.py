"""Inputs of dynamic_threshold. The dtype of a case is the network's."""

from __future__ import annotations

import math

import torch
from torch import Generator, Tensor

from idm_fast.kernels.case import Case, Inputs, Outputs, Suite, element_size, poison, to_float64
from idm_fast.kernels.dynamic_threshold import dynamic_threshold
from idm_fast.kernels.dynamic_threshold.reference import dynamic_threshold as reference

NOTHING = (1e30,) * 8  # a row that must not be read
ROW = (1.25, -0.75) + (1e30,) * 6  # k_x, k_out; the other columns are not read


def case(
    name: str,
    why: str,
    shape: tuple[int, int, int, int],
    quantile: float,
    *,
    scale: float = 2.0,
    step: int | None = None,
    layer: bool = False,
) -> Case:
    elements = math.prod(shape)

    def make(dtype: torch.dtype, generator: Generator) -> Inputs:
        x, output = (
            (scale * torch.randn(shape, generator=generator)).contiguous(memory_format=torch.channels_last)
            for _ in range(2)
        )
        return {
            "x": x,
            "model_output": output.to(dtype),
            "table": torch.tensor([NOTHING, ROW, NOTHING] if step is None else [ROW, NOTHING, ROW]),
            "step": 1 if step is None else torch.tensor([step]),
            "quantile": quantile,
        }

    moved = lambda dtype: elements * (4 + element_size(dtype)) + 4 * shape[0]  # noqa: E731
    return Case(name, why, make, moved, 3 * elements, layer)


CASES = [
    case("idm_128", "idm-128: one face, the quantile of Imagen's users", (1, 3, 128, 128), 0.995, layer=True),
    case("idm_128_b16", "idm-128: a batch of faces", (16, 3, 128, 128), 0.995, layer=True),
    case("latent", "a 4-channel latent", (4, 4, 32, 32), 0.9, layer=True),
    case("odd", "75 elements", (3, 3, 5, 5), 0.93),
    case("median", "exactly between two of an even number", (2, 1, 3, 4), 0.5),
    case("lowest", "the smallest value, far below 1", (2, 3, 8, 8), 0.0),
    case("highest", "the largest value", (2, 3, 8, 8), 1.0),
    case("one", "one element a sample", (3, 1, 1, 1), 0.4),
    case("small", "below 1 it is 1", (2, 3, 8, 8), 0.9, scale=0.1),
    case("large", "large values, of many exponents", (1, 3, 40, 70), 0.7, scale=1e3),
    case("counter", "the step is a counter on the device", (2, 3, 8, 8), 0.9, step=0),
    case("counter_above", "a counter above the table is its last row", (2, 3, 8, 8), 0.9, step=99),
]


def call(inputs: Inputs) -> Outputs:
    return {"threshold": dynamic_threshold(**inputs, out=poison(inputs["x"].new_empty(inputs["x"].shape[0])))}


def exact(inputs: Inputs) -> Outputs:
    i = to_float64(inputs)
    return {"threshold": reference(**i, out=i["x"].new_empty(i["x"].shape[0]))}


def eager(inputs: Inputs) -> Tensor:
    k_x, k_out = inputs["table"][int(inputs["step"])].tolist()[:2]
    x0_hat = k_x * inputs["x"] + k_out * inputs["model_output"].float()
    found: Tensor = x0_hat.abs().flatten(1).quantile(inputs["quantile"], dim=1).clamp(min=1.0)
    return found


SUITE = Suite(CASES, (torch.float32, torch.bfloat16, torch.float16), dynamic_threshold, call, exact, eager)
