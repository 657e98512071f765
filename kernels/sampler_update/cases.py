"""Inputs of sampler_update: rows of real solvers, and awkward shapes. The dtype of a case is the network's."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Generator

from idm_fast.kernels.case import Case, Inputs, Outputs, Suite, element_size, poison, to_float64
from idm_fast.kernels.sampler_update import sampler_update
from idm_fast.kernels.sampler_update.reference import sampler_update as reference

# k_x, k_out, a, b, c, s, clamp, reserved
# The parameterisations, x0_hat = k_x x + k_out model_output, at alpha = 0.8, sigma = 0.6 (variance preserving):
#   eps: k_x = 1 / alpha, k_out = -sigma / alpha;  v: k_x = alpha, k_out = -sigma;  x0: k_x = 0, k_out = 1
# DDIM to alpha' = 0.98, sigma' = sqrt(1 - 0.98^2): a = sigma' / sigma, b = alpha' - alpha sigma' / sigma
EPS = (1.25, -0.75, 0.331662, 0.714670, 0.0, 0.0, 1.0, 0.0)
V = (0.8, -0.6, 0.331662, 0.714670, 0.0, 0.0, 1.0, 0.0)
X0 = (0.0, 1.0, 0.331662, 0.714670, 0.0, 0.0, 0.0, 0.0)
LAST = (0.0, 1.0, 0.0, 1.0, 0.0, 0.0, 1.0, 0.0)  # sigma' = 0: the picture itself
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
    unshuffle: int = 1,
    beside: tuple[int, int] = (0, 0),  # channels of the condition before and after x's, each times unshuffle^2
    step: int | None = None,  # a counter on the device with this value; rows 0 and 2 must not be read, but beyond them
    threshold: bool = False,
    shuffled: bool = False,  # model_output is laid out as the network's input
    base: bool = False,
    history_nan: bool = False,
    seeds: tuple[int, ...] | None = None,
    layer: bool = False,
) -> Case:
    n, elements = shape[0], shape[0] * shape[1] * shape[2] * shape[3]

    def image(generator: Generator) -> torch.Tensor:
        return torch.randn(shape, generator=generator).contiguous(memory_format=torch.channels_last)

    def make(dtype: torch.dtype, generator: Generator) -> Inputs:
        x, output, history = image(generator), image(generator).to(dtype), image(generator)
        rows = [NOTHING, row, NOTHING] if step is None else [row, NOTHING, row]
        inputs: Inputs = {
            "x": x,
            "model_output": output,
            "history": poison(history) if history_nan else history,
            "table": torch.tensor(rows, dtype=torch.float32),
            "step": 1 if step is None else torch.tensor([step]),
            "seeds": torch.tensor(seeds or [17 * i + 3 for i in range(n)], dtype=torch.int64),
            "network_input": place_for(shape, dtype) if network_input else None,
        }
        if shuffled:
            inputs["model_output"] = F.pixel_unshuffle(output, unshuffle).contiguous(memory_format=torch.channels_last)
        if base:
            inputs["base"] = image(generator)
        if threshold:
            inputs["threshold"] = torch.linspace(1.0, 1.75, n)
        if unshuffle != 1:
            inputs["unshuffle"] = unshuffle
        return inputs

    def place_for(shape: tuple[int, int, int, int], dtype: torch.dtype) -> torch.Tensor:
        """Where the network reads x: channels of a wider NHWC tensor, full of NaN."""
        _, c, h, w = shape
        before, mine, after = (part * unshuffle**2 for part in (beside[0], c, beside[1]))
        wide = torch.full((n, h // unshuffle, w // unshuffle, before + mine + after), float("nan"), dtype=dtype)
        return wide.permute(0, 3, 1, 2)[:, before : before + mine]

    history_reads = 1 if row[4] else 0

    def bytes_moved(dtype: torch.dtype) -> int:
        size = element_size(dtype)
        return elements * (4 + size + 4 * base + 4 * history_reads + 4 + 4 + (size if network_input else 0))

    return Case(name, why, make, bytes_moved, 60 * elements if row[5] else 10 * elements, layer)


CASES = [
    case("ddim_128", "idm-128: one face, deterministic", (1, 3, 128, 128), DDIM, history_nan=True, layer=True),
    case("ddpm_128", "idm-128: one face, with noise", (1, 3, 128, 128), DDPM, history_nan=True, layer=True),
    case("ddpm_128_b16", "idm-128: a batch of faces", (16, 3, 128, 128), DDPM, history_nan=True, layer=True),
    case("eps_128", "idm-128: the network predicts eps", (1, 3, 128, 128), EPS, history_nan=True, layer=True),
    case(
        *("ddim_128_b16", "idm-128: a batch of faces, deterministic", (16, 3, 128, 128), DDIM),
        history_nan=True,
        layer=True,
    ),
    case(
        *("input_128", "idm-128: into the stem's input, beside the condition", (1, 3, 128, 128), DDPM),
        unshuffle=2,
        beside=(0, 3),
        history_nan=True,
        layer=True,
    ),
    case(
        *("residual_128", "idm-128: its own output's layout, plus the condition", (1, 3, 128, 128), DDPM),
        unshuffle=2,
        beside=(0, 3),
        shuffled=True,
        base=True,
        history_nan=True,
        layer=True,
    ),
    case("multistep_latent", "a multistep solver on a 4-channel latent", (4, 4, 32, 32), MULTISTEP, layer=True),
    case("odd", "75 elements: the last Philox counter is cut short", (3, 3, 5, 5), MULTISTEP),
    case("tiny", "one element an image", (2, 1, 1, 1), MULTISTEP),
    case("long", "more than one span a worker, not a multiple of a turn", (1, 5, 61, 67), MULTISTEP),
    case("eps", "x0_hat of a network that predicts eps", (2, 3, 8, 8), EPS),
    case("v", "x0_hat of a network that predicts v", (2, 3, 8, 8), V),
    case("x0", "x0_hat of a network that predicts it, not clamped", (2, 3, 8, 8), X0),
    case("last", "the last step: x is x0_hat", (2, 3, 8, 8), LAST),
    case("threshold", "dynamic threshold, one a sample, instead of the clamp", (4, 3, 7, 9), DDPM, threshold=True),
    case("counter", "the step is a counter on the device", (2, 3, 8, 8), MULTISTEP, step=2),
    case("counter_above", "a counter above the table is its last row", (2, 3, 8, 8), DDPM, step=2**40),
    case("counter_below", "a counter below the table is its first row", (2, 3, 8, 8), DDPM, step=-7),
    case("slice", "channels of a wider input: x, condition", (2, 3, 6, 5), DDPM, beside=(0, 3)),
    case("slice_behind", "channels of a wider input: condition, x", (2, 3, 6, 5), DDIM, beside=(2, 0)),
    case("unshuffle_2", "an input of twice the channels' square", (2, 3, 6, 10), DDPM, unshuffle=2),
    case("unshuffle_2_slice", "the same beside a condition", (3, 3, 34, 38), DDPM, unshuffle=2, beside=(0, 3)),
    case("unshuffle_4_slice", "and behind one", (2, 1, 8, 12), DDPM, unshuffle=4, beside=(3, 0)),
    case("base", "a residual network: the condition is added", (2, 3, 7, 5), DDPM, base=True, threshold=True),
    case("shuffled_2", "the output as such a network has it", (2, 3, 6, 10), DDIM, unshuffle=2, shuffled=True),
    case(
        *("shuffled_2_base", "the same of a residual one, beside the condition", (3, 3, 34, 38), MULTISTEP),
        unshuffle=2,
        beside=(0, 3),
        shuffled=True,
        base=True,
    ),
    case(
        *("shuffled_4_no_input", "and where nothing is made for the network", (2, 1, 8, 12), DDPM),
        unshuffle=4,
        shuffled=True,
        network_input=False,
    ),
    case("one_column", "one position a row: its stride says nothing", (2, 3, 4, 1), DDPM, beside=(1, 1)),
    case("no_input", "without a copy for the network", (2, 3, 8, 8), DDPM, network_input=False),
    case("seed_bits", "all 64 bits of a seed count", (4, 3, 8, 8), DDPM, seeds=(-1, 2**40 + 1, 1, -(2**63))),
]

WRITTEN = ("x", "history", "network_input")


def copied(inputs: Inputs) -> Inputs:
    """Copies of what is written, in the same layout: a channel slice stays one."""
    return {k: same_layout(v) if k in WRITTEN and v is not None else v for k, v in inputs.items()}


def same_layout(tensor: torch.Tensor) -> torch.Tensor:
    copy = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device)
    return copy.copy_(tensor)


def call(inputs: Inputs) -> Outputs:
    mine = copied(inputs)
    sampler_update(**mine)
    return {k: mine[k] for k in WRITTEN if mine[k] is not None}


def exact(inputs: Inputs) -> Outputs:
    mine = copied(to_float64(inputs))
    reference(**mine)
    return {k: mine[k] for k in WRITTEN if mine[k] is not None}


def eager(inputs: Inputs) -> None:
    """The update as a sampler in plain torch has it, with torch's own generator."""
    x, history, network_input = inputs["x"], inputs["history"], inputs["network_input"]
    k_x, k_out, a, b, c, s, clamp, _ = inputs["table"][int(inputs["step"])].tolist()
    output = inputs["model_output"]
    if output.shape != x.shape:
        output = F.pixel_shuffle(output, inputs["unshuffle"])
    x0_hat = k_x * x + k_out * (output.float() + inputs["base"] if "base" in inputs else output.float())
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
        network_input.copy_(F.pixel_unshuffle(new, inputs["unshuffle"]) if "unshuffle" in inputs else new)


SUITE = Suite(CASES, (torch.float32, torch.bfloat16, torch.float16), sampler_update, call, exact, eager)
