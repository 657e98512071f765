"""Inputs of time_embedding: the tables of real networks, and awkward ones."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from idm_fast.kernels.case import Case, Inputs, Outputs, Suite, element_size, poison, to_float64
from idm_fast.kernels.time_embedding import time_embedding
from idm_fast.kernels.time_embedding.reference import time_embedding as reference

# Rows that each block's projection has (scale and shift: twice its channels; SR3: the shift alone).
IDM_128 = (128, 256, 256) + (384,) * 5 + (256,) * 3 + (128,) * 2
SR3_128 = (64,) * 2 + (128,) * 2 + (256,) * 2 + (512,) * 12 + (256,) * 3 + (128,) * 3 + (64,) * 3
GD_256 = (256,) * 6 + (512,) * 6 + (1024,) * 15 + (512,) * 8 + (256,) * 7
DIFFACE_512 = (64, 128, 128, 256, 256) + (512,) * 4 + (1024,) * 18 + (512,) * 6 + (256,) * 3 + (128,) * 3 + (64,) * 2
NETWORKS = {sum(blocks): blocks for blocks in (IDM_128, SR3_128, GD_256, DIFFACE_512)}


def case(
    name: str,
    why: str,
    steps: int,
    features: int,
    width: int,
    blocks: tuple[int, ...],
    *,
    hidden: int = 0,  # 0: 4 x features
    noise_level: bool = False,  # t in (0, 1], else 0 .. 1000
    order: str = "cos_sin",
    embed_silu: bool = True,
    labels: int = 0,  # rows of the class embedding
    biases: bool = True,
    float_table: bool = False,
    layer: bool = False,
    timed_only: bool = False,
) -> Case:
    hidden, sums = hidden or 4 * features, sum(blocks)

    def make(dtype: torch.dtype, generator: Generator) -> Inputs:
        def linear(rows: int, cols: int) -> tuple[Tensor, Tensor | None]:
            weight = torch.randn(rows, cols, generator=generator) / cols**0.5
            bias = 0.1 * torch.randn(rows, generator=generator)
            return weight.to(dtype), bias.to(dtype) if biases else None

        t = torch.linspace(1.0, 1e-3, steps) if noise_level else torch.linspace(999.0, 0.0, steps)
        inputs: Inputs = {"t": t, "order": order, "embed_silu": embed_silu}
        inputs["weight1"], inputs["bias1"] = linear(hidden, features)
        inputs["weight2"], inputs["bias2"] = linear(width, hidden)
        inputs["weight"], inputs["bias"] = linear(sums, width)
        if labels:
            inputs["label"] = torch.randn(labels, width, generator=generator).to(dtype)
        if float_table:
            inputs["dtype"] = torch.float32
        return inputs

    products = hidden * features + width * hidden + sums * width
    moved = lambda dtype: (products + steps * sums) * element_size(dtype)  # noqa: E731
    return Case(name, why, make, moved, 2 * steps * products, layer, timed_only)


CASES = [
    case("idm128_t1", "idm-128: one step", 1, 64, 128, IDM_128, layer=True),
    case("idm128_t4", "idm-128: the few steps that it is shipped with", 4, 64, 128, IDM_128, layer=True),
    case("idm128_t50", "idm-128: a long walk", 50, 64, 128, IDM_128, layer=True, timed_only=True),
    case("idm128_t1000", "idm-128: every step of training", 1000, 64, 128, IDM_128, layer=True, timed_only=True),
    case(
        *("sr3_t50", "sr3-128: noise levels, no last SiLU", 50, 64, 64, SR3_128),
        noise_level=True,
        order="sin_cos",
        embed_silu=False,
        layer=True,
        timed_only=True,
    ),
    case("gd_t50", "gd-256: the widest embedding", 50, 128, 512, GD_256, layer=True, timed_only=True),
    case("difface_t100", "difface-512: its chain", 100, 32, 128, DIFFACE_512, layer=True, timed_only=True),
    case("noise_level", "neighbouring noise levels", 40, 16, 24, (40, 30), noise_level=True, order="sin_cos"),
    case("no_last_silu", "SR3: e itself is projected", 5, 32, 48, (100,), embed_silu=False),
    case("label", "one class for all steps", 5, 32, 48, (100,), labels=1),
    case("labels", "a class a step", 5, 32, 48, (100,), labels=5),
    case("no_bias", "products alone", 3, 32, 48, (100,), biases=False),
    case("float_table", "a float32 table of 16-bit weights", 3, 32, 48, (100,), float_table=True),
    case("odd", "no size a multiple of any tile", 17, 10, 33, (7, 90), hidden=37),
    case("tiny", "one value a matrix", 1, 2, 1, (1,), hidden=1),
]


def call(inputs: Inputs) -> Outputs:
    dtype = inputs.get("dtype", inputs["weight"].dtype)
    out = torch.empty(len(inputs["t"]), len(inputs["weight"]), dtype=dtype, device=inputs["t"].device)
    return {"table": time_embedding(**inputs, out=poison(out))}


def exact(inputs: Inputs) -> Outputs:
    i = to_float64(inputs)
    out = torch.empty(len(i["t"]), len(i["weight"]), dtype=torch.float64, device=i["t"].device)
    names = ("t", "weight1", "bias1", "weight2", "bias2", "weight", "bias")
    arguments = [*(i[name] for name in names), i["order"] == "cos_sin", i.get("label"), i["embed_silu"], out]
    reference(*arguments)
    return {"table": out}


def linear32(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.linear(x, weight.float(), None if bias is None else bias.float())


def eager(inputs: Inputs) -> list[Tensor]:
    """A step at a time and a block at a time, as the network's forward has it."""
    i = inputs
    half = i["weight1"].shape[1] // 2
    frequencies = torch.exp(torch.arange(half, device=i["t"].device) * (-torch.tensor(10000.0).log().item() / half))
    blocks = NETWORKS.get(len(i["weight"]), (len(i["weight"]),))
    weights = i["weight"].split(blocks)
    biases = [None] * len(blocks) if i["bias"] is None else i["bias"].split(blocks)
    made = []
    for step in i["t"].split(1):
        angles = step[:, None] * frequencies
        halves = [angles.cos(), angles.sin()] if i["order"] == "cos_sin" else [angles.sin(), angles.cos()]
        hidden = linear32(torch.cat(halves, 1), i["weight1"], i["bias1"])
        e = linear32(F.silu(hidden), i["weight2"], i["bias2"])
        if i.get("label") is not None:
            e = e + i["label"][:1]
        e = (F.silu(e) if i["embed_silu"] else e).to(i["weight"].dtype)
        made += [F.linear(e, weight, bias) for weight, bias in zip(weights, biases, strict=True)]
    return made


SUITE = Suite(CASES, (torch.float32, torch.bfloat16, torch.float16), time_embedding, call, exact, eager)
