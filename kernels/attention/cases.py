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
    timed_only: bool = False,
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
    return Case(
        name, why, make, lambda dtype: rows * element_size(dtype), 4 * n * heads * length * s * d, layer, timed_only
    )


CASES = [
    case("idm128_16px", "idm-128: 16 px, 192 channels in heads of 64", (1, 256, 3, 64), layer=True),
    case("gd256_32px", "gd-256 and difface-512: 32 px, 256 channels in heads of 64", (1, 1024, 4, 64), layer=True),
    case("gd256_16px", "gd-256 and difface-512: 16 px, 512 channels in heads of 64", (1, 256, 8, 64), layer=True),
    case("gd256_8px", "gd-256 and difface-512: 8 px, 512 channels in heads of 64", (1, 64, 8, 64), layer=True),
    case("gd256_16px_batch", "gd-256: 16 px, four images", (4, 256, 8, 64), layer=True),
    case("sr3_16px", "sr3-128: 16 px, one head of 512 channels", (1, 256, 1, 512), layer=True),
    case("sr3_512_32px", "sr3-512: middle at 32 px, one head of 1024", (1, 1024, 1, 1024), layer=True, timed_only=True),
    case("vq_f4_64px", "vq-f4 codec: middle at 64 px, one head of 512", (1, 4096, 1, 512), layer=True, timed_only=True),
    case("one_token", "a 1 x 1 image", (2, 1, 2, 32)),
    case("odd", "no multiple of any tile", (2, 77, 3, 40)),
    case("narrow", "heads narrower than a matrix instruction, and of odd width", (1, 50, 2, 5)),
    case("head128", "the widest head that most kernels take", (1, 70, 1, 128)),
    case("head200", "a head between two widths", (1, 33, 1, 200)),
    case("wide_tail", "a wide head that is no multiple of a tile", (1, 20, 1, 304)),
    case("panel_tail", "one key more than the key blocks hold", (1, 5, 1, 72), keys=257),
    case("long_cross", "few queries, many keys: too few blocks unless the keys are cut", (1, 5, 1, 40), keys=1100),
    case("long_wide", "the same for a head whose values take two blocks", (1, 9, 1, 264), keys=310),
    case("cross", "more keys than queries", (1, 9, 2, 16), keys=70),
    case("cross_one_key", "one key: its value, whatever the score", (2, 37, 1, 24), keys=1),
    case("sharp", "scores of +-1e3: the maximum must be subtracted", (1, 40, 1, 32), spread=14.0),
    case("saturated", "scores of +-1e4: one weight is one, the rest zero", (1, 70, 2, 32), spread=100.0),
    case("flat", "scale 0: the mean of the values", (1, 33, 1, 16), scale=0.0),
    case("backwards", "a negative scale: the lowest score weighs most", (1, 33, 2, 16), scale=-0.7),
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
