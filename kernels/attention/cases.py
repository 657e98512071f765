"""Inputs of attention: layers of real networks, and awkward ones."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from idm_fast.kernels.attention import attention
from idm_fast.kernels.attention.reference import attention as reference
from idm_fast.kernels.case import Case, Inputs, Outputs, Suite, element_size, to_float64


def case(
    name: str,
    why: str,
    shape: tuple[int, int, int, int],  # N, L, heads, d
    *,
    keys: int | None = None,
    spread: float = 1.0,
    scale: float | None = None,
    layer: bool = False,
) -> Case:
    n, length, heads, d = shape

    def make(dtype: torch.dtype, generator: Generator) -> Inputs:
        if keys is None:  # views of one packed projection, as the networks have them
            packed = (spread * torch.randn(n, length, 3, heads, d, generator=generator)).to(dtype)
            q, k, v = packed.unbind(2)
        else:
            q = torch.randn(n, length, heads, d, generator=generator).to(dtype)
            k, v = torch.randn(2, n, keys, heads, d, generator=generator).to(dtype)
        return {"q": q, "k": k, "v": v, "scale": scale}

    s = length if keys is None else keys
    rows = 2 * n * heads * d * (length + s)
    return Case(name, why, make, lambda dtype: rows * element_size(dtype), 4 * n * heads * length * s * d, layer)


CASES = [
    case("idm128_16px", "idm-128: 16 px, 192 channels in heads of 64", (1, 256, 3, 64), layer=True),
    case("gd256_16px", "gd-256: 16 px, heads of 64", (1, 256, 8, 64), layer=True),
    case("sr3_16px", "sr3-128: 16 px, one head of 512 channels", (1, 256, 1, 512), layer=True),
    case("one_token", "a 1 x 1 image", (2, 1, 2, 32)),
    case("odd", "no multiple of any tile", (2, 77, 3, 40)),
    case("narrow", "heads narrower than a matrix instruction", (1, 50, 2, 5)),
    case("cross", "more keys than queries", (1, 9, 2, 16), keys=70),
    case("sharp", "scores of +-1e3: the maximum must be subtracted", (1, 40, 1, 32), spread=14.0),
    case("flat", "scale 0: the mean of the values", (1, 33, 1, 16), scale=0.0),
]


def call(inputs: Inputs) -> Outputs:
    q = inputs["q"]
    return {"out": attention(**inputs, out=torch.full(q.shape, float("nan"), dtype=q.dtype, device=q.device))}


def exact(inputs: Inputs) -> Outputs:
    i = to_float64(inputs)
    scale = i["q"].shape[-1] ** -0.5 if i["scale"] is None else i["scale"]
    return {"out": reference(i["q"], i["k"], i["v"], scale, None)}


def eager(inputs: Inputs) -> Tensor:
    q, k, v = (inputs[name].transpose(1, 2) for name in "qkv")
    return F.scaled_dot_product_attention(q, k, v, scale=inputs["scale"]).transpose(1, 2).contiguous()


SUITE = Suite(CASES, (torch.float32, torch.bfloat16, torch.float16), attention, call, exact, eager)
