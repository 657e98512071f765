"""The copies at both ends of a plan: pixels to channels and back, turned or not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional

from idm_fast.engine.bind import Binder
from idm_fast.engine.buffers import Buffers
from idm_fast.engine.nodes import Shuffle, Unshuffle, Value

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# N, C, h, w of the small image, factor: odd sizes, more than one image, one pixel.
SIZES = [(1, 3, 8, 8, 2), (3, 3, 5, 7, 2), (2, 4, 5, 3, 1), (2, 1, 3, 1, 3), (1, 5, 1, 1, 2)]


def _ran(node: type[Unshuffle] | type[Shuffle], x: torch.Tensor, out: torch.Tensor, **rest: Any) -> torch.Tensor:
    values = [Value(name, tuple(t.shape), t.dtype) for name, t in (("x", x), ("out", out))]
    none: Any = None  # these copies ask for nothing else
    buffers = Buffers(dict(zip(values, (x, out), strict=True)), {}, none, none, none, none, none)
    bound = Binder(buffers, none, none).bind(node(layer="here", x=values[0], out=values[1], **rest))
    for _ in range(2):  # bound once, run again and again on what then lies there
        x.neg_()
        out.fill_(float("nan"))
        bound.call()
    return out


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("n", "c", "h", "w", "factor"), SIZES)
def test_pixels_to_channels_and_back(
    n: int, c: int, h: int, w: int, factor: int, dtype: torch.dtype, turned: bool
) -> None:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(n, c, h * factor, w * factor, generator=generator).to(memory_format=torch.channels_last)
    inside = functional.pixel_unshuffle(pixels, factor).to(dtype)
    inside = (inside.flip(2, 3) if turned else inside).to(memory_format=torch.channels_last)
    out = torch.empty_like(inside)
    assert torch.equal(_ran(Unshuffle, pixels, out, factor=factor, turned=turned), inside)
    back = torch.empty_like(pixels)
    assert torch.equal(_ran(Shuffle, inside, back, factor=factor, turned=turned), pixels.to(dtype).float())
