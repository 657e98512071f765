"""Inputs of sampler_update: rows of real solvers, and awkward shapes. The dtype of a case is the network's."""

from __future__ import annotations

import torch
from torch import Generator

from idm_fast.kernels.case import Case, Inputs, Outputs, Suite, element_size, poison, to_float64
from idm_fast.kernels.sampler_update import sampler_update
from idm_fast.kernels.sampler_update.reference import sampler_update as reference

# k_x, k_out, a, b, c, s, clamp, reserved
DDIM = (1.25, -0.75, 0.5, 0.62, 0.0, 0.0, 1.0, 0.0)
DDPM = (1.25, -0.75, 0.5, 0.62, 0.0, 0.3, 1.0, 0.0)
MULTISTEP = (0.8, -0.6, 0.7, 0.9, -0.4, 0.2, 0.0, 0.0)
NOTHING = (1e30,) * 8  # a row that must not be read


def case(
    name: str,
    why: str,
    shape: tuple[int, int, int, int],
    row: tuple[float, ...],
    *,
    network_input: bool = True,
    history_nan: bool = False,
    seeds: tuple[int, ...] | None = None,
    layer: bool = False,
) -> Case:
    n, elements = shape[0], shape[0] * shape[1] * shape[2] * shape[3]

    def image(generator: Generator) -> torch.Tensor:
        return torch.randn(shape, generator=generator).contiguous(memory_format=torch.channels_last)

    def make(dtype: torch.dtype, generator: Generator) -> Inputs:
        x, output, history = image(generator), image(generator).to(dtype), image(generator)
        return {
            "x": x,
            "model_output": output,
            "history": poison(history) if history_nan else history,
            "table": torch.tensor([NOTHING, row, NOTHING], dtype=torch.float32),
            "step": 1,
            "seeds": torch.tensor(seeds or [17 * i + 3 for i in range(n)], dtype=torch.int64),
            "network_input": poison(output) if network_input else None,
        }

    history_reads = 1 if row[4] else 0

    def bytes_moved(dtype: torch.dtype) -> int:
        size = element_size(dtype)
        return elements * (4 + size + 4 * history_reads + 4 + 4 + (size if network_input else 0))

    return Case(name, why, make, bytes_moved, 60 * elements if row[5] else 10 * elements, layer)


CASES = [
    case("ddim_128", "idm-128: one face, deterministic", (1, 3, 128, 128), DDIM, history_nan=True, layer=True),
    case("ddpm_128", "idm-128: one face, with noise", (1, 3, 128, 128), DDPM, history_nan=True, layer=True),
    case("ddpm_128_b16", "idm-128: a batch of faces", (16, 3, 128, 128), DDPM, history_nan=True, layer=True),
    case("multistep_latent", "a multistep solver on a 4-channel latent", (4, 4, 32, 32), MULTISTEP, layer=True),
    case("odd", "75 elements: the last Philox counter is cut short", (3, 3, 5, 5), MULTISTEP),
    case("tiny", "one element an image", (2, 1, 1, 1), MULTISTEP),
    case("long", "more than one span a worker, not a multiple of a turn", (1, 5, 61, 67), MULTISTEP),
    case("no_input", "without a copy for the network", (2, 3, 8, 8), DDPM, network_input=False),
    case("seed_bits", "all 64 bits of a seed count", (4, 3, 8, 8), DDPM, seeds=(-1, 2**40 + 1, 1, -(2**63))),
]

WRITTEN = ("x", "history", "network_input")


def call(inputs: Inputs) -> Outputs:
    mine = {k: v.clone() if k in WRITTEN and v is not None else v for k, v in inputs.items()}
    sampler_update(**mine)
    return {k: mine[k] for k in WRITTEN if mine[k] is not None}


def exact(inputs: Inputs) -> Outputs:
    i = {k: v.clone() if k in WRITTEN and v is not None else v for k, v in to_float64(inputs).items()}
    reference(i["x"], i["model_output"], i["history"], i["table"], i["step"], i["seeds"], i["network_input"])
    return {k: i[k] for k in WRITTEN if i[k] is not None}


def eager(inputs: Inputs) -> None:
    """The update as a sampler in plain torch has it, with torch's own generator."""
    x, history, network_input = inputs["x"], inputs["history"], inputs["network_input"]
    k_x, k_out, a, b, c, s, clamp, _ = inputs["table"][inputs["step"]].tolist()
    x0_hat = k_x * x + k_out * inputs["model_output"].float()
    if clamp > 0:
        x0_hat = x0_hat.clamp(-clamp, clamp)
    new = a * x + b * x0_hat
    if c:
        new = new + c * history
    if s:
        new = new + s * torch.randn_like(x)
    x.copy_(new)
    history.copy_(x0_hat)
    if network_input is not None:
        network_input.copy_(new)


SUITE = Suite(CASES, (torch.float32, torch.bfloat16, torch.float16), sampler_update, call, exact, eager)
