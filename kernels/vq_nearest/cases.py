"""Inputs of vq_nearest: codecs of real networks, and awkward ones.

Two right answers may differ where two codes are equally near but for rounding, so codes are not compared. Judged are
the distance of the chosen code, in float64, against the least one, and how far ``quantised`` is from that code's row.
"""

from __future__ import annotations

import torch
from torch import Generator, Tensor

from idm_fast.kernels.case import Case, Inputs, Outputs, Suite, element_size, poison
from idm_fast.kernels.vq_nearest import positions, vq_nearest
from idm_fast.kernels.vq_nearest.reference import vq_nearest as reference


def case(
    name: str,
    why: str,
    shape: tuple[int, int, int, int],  # N, D, H, W
    size: int,
    *,
    mean: float = 0.0,
    spread: float = 1.0,
    wide_book: bool = False,
    layer: bool = False,
    timed_only: bool = False,
) -> Case:
    n, d, h, w = shape

    def make(dtype: torch.dtype, generator: Generator) -> Inputs:
        z = mean + spread * torch.randn(n, h, w, d, generator=generator)
        codebook = mean + spread * torch.randn(size, d, generator=generator)
        return {"z": z.to(dtype).permute(0, 3, 1, 2), "codebook": codebook if wide_book else codebook.to(dtype)}

    def moved(dtype: torch.dtype) -> int:
        return (2 * n * d * h * w + size * d) * element_size(dtype) + 8 * n * h * w

    return Case(name, why, make, moved, 2 * n * h * w * size * d, layer, timed_only)


CASES = [
    case("vq_f4_64px", "vq-f4 codec: 8192 codes of 3, 64 px", (1, 3, 64, 64), 8192, layer=True, timed_only=True),
    case("codeformer_16px", "CodeFormer: 1024 codes of 256, 16 px", (1, 256, 16, 16), 1024, layer=True),
    case("vqgan_f16", "VQGAN f16: 16384 codes of 256, 16 px", (1, 256, 16, 16), 16384, layer=True, timed_only=True),
    case("vq_f8_32px", "vq-f8 codec: 16384 codes of 4, 32 px", (1, 4, 32, 32), 16384, layer=True, timed_only=True),
    case("narrow", "three channels, as vq-f4 has them", (1, 3, 10, 12), 600),
    case("latent", "four channels, as our own codec has them; positions and codes fill no block", (2, 4, 7, 9), 1100),
    case("small", "every tile has a tail", (2, 5, 3, 7), 77),
    case("wide", "more channels than a step", (1, 70, 5, 5), 130, wide_book=True),
    case("one_code", "nothing to choose", (1, 4, 3, 3), 1),
    case("one_position", "a 1 x 1 image", (1, 33, 1, 1), 65),
    case("shifted", "all codes far from zero, near each other", (1, 8, 9, 9), 100, mean=-2.3, spread=0.5),
    case("far", "a mean of 1e3 deviations: rounding decides among the nearest", (1, 8, 9, 9), 100, mean=1e3),
    case("float32_book", "codes in float32 whatever the image is", (1, 16, 4, 4), 64, wide_book=True),
]


def judged(inputs: Inputs, codes: Tensor, quantised: Tensor) -> Outputs:
    rows, chosen = positions(inputs["z"]).double(), inputs["codebook"][codes.flatten()]
    distance = (rows - chosen.double()).square().sum(dim=1)
    from_the_row = (positions(quantised).double() - chosen.double()).to(quantised.dtype)
    return {"distance": distance.float(), "from_the_row": from_the_row}


def call(inputs: Inputs) -> Outputs:
    z, codebook = inputs["z"], inputs["codebook"]
    n, _, h, w = z.shape
    codes = torch.full((n, h, w), 2**40, dtype=torch.int64, device=z.device)  # no index: one left would raise
    return judged(inputs, *vq_nearest(z, codebook, out_codes=codes, out_quantised=poison(z)))


def exact(inputs: Inputs) -> Outputs:
    z, codebook = inputs["z"], inputs["codebook"]
    codes = torch.empty((z.shape[0], *z.shape[2:]), dtype=torch.int64, device=z.device)
    quantised = torch.empty_like(z)
    reference(z, codebook, codes, quantised)
    outputs = judged(inputs, codes, quantised)
    outputs["from_the_row"].zero_()  # without the rounding to z's dtype
    return outputs


def eager(inputs: Inputs) -> Tensor:
    """As the codecs write it: the whole matrix of distances."""
    rows, codebook = positions(inputs["z"]).float(), inputs["codebook"].float()
    distances = rows.square().sum(1, keepdim=True) + codebook.square().sum(1) - 2 * rows @ codebook.T
    found: Tensor = inputs["codebook"][distances.argmin(dim=1)]
    return found


SUITE = Suite(CASES, (torch.float32, torch.bfloat16, torch.float16), vq_nearest, call, exact, eager)
