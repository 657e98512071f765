"""A VQGAN and a shape -> the calls of its encoder and of its decoder.

The encoder's strided convolutions pad one row below and one column to the right; ours pad on all sides. Seen from the
other corner the two are the same: in a turned image of an even side the window that began at 2 i begins at 2 j - 1.
So the encoder works on pictures turned by 180 degrees, with kernels that are turned when they are packed (weights.py),
and its latent is turned back: no call is added and no padded copy made.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from idm_fast.engine.nodes import Nearest, Node, Shuffle, Unshuffle, Value, Weight
from idm_fast.engine.writer import Image, Shape, Writer, without_unread_stats
from idm_fast.models.blocks import Attention, Downsample, NormSiLU, PlainBlock, Upsample
from idm_fast.models.vqgan import Vqgan


@dataclass(frozen=True)
class LoweredPart:
    """``nodes`` lead from ``x`` to ``out``, both float32 images. ``quantised``: the value between the codebook, which
    comes first, and the rest; ``codes``: their numbers."""

    nodes: tuple[Node, ...]
    x: Value
    out: Value
    quantised: Value | None = None
    codes: Value | None = None


def lower_encoder(model: Vqgan, shape: Shape, dtype: torch.dtype) -> LoweredPart:
    """N pictures of H x W pixels -> latents."""
    c, (n, height, width) = model.config, shape
    write = _Tower(n, dtype)
    x = Value("encoder.x", (n, c.in_channels, height, width), torch.float32, fixed=True)
    inside = (height // c.unshuffle, width // c.unshuffle)
    entry = Value("encoder.input", (n, c.in_channels * c.unshuffle**2, *inside), dtype)
    write.nodes.append(Unshuffle(layer="encoder", x=x, factor=c.unshuffle, turned=True, out=entry))
    h = write.conv("encoder.stem", entry, c.stem_width)
    h = write.stack("encoder.down", model.encoder.down, h)
    h = write.stack("encoder.middle", model.encoder.middle, h)
    h = write.normed_conv("encoder.out_norm", "encoder.out_conv", model.encoder.out_norm, h, c.z_channels)
    h = write.conv("to_latent", h.value, c.embed_channels, kernel=1)
    out = Value("latent", h.value.shape, torch.float32, fixed=True)
    write.nodes.append(Shuffle(layer="encoder", x=h.value, factor=1, turned=True, out=out))
    return LoweredPart(without_unread_stats(write.nodes), x, out)


def lower_decoder(model: Vqgan, shape: Shape, dtype: torch.dtype) -> LoweredPart:
    """N latents, of pictures of H x W pixels -> the pictures; the nearest codes are found in float32."""
    c, (n, height, width) = model.config, shape
    write = _Tower(n, dtype)
    size = (n, c.embed_channels, height // c.factor, width // c.factor)
    x, quantised = (Value(f"decoder.{name}", size, torch.float32, fixed=True) for name in ("x", "quantised"))
    codes = Value("decoder.codes", (n, *size[2:]), torch.int64, fixed=True)
    book = Weight("codebook.weight", "vector")
    write.nodes.append(Nearest(layer="codebook", x=x, codebook=book, out=quantised, out_codes=codes))
    entry = Value("decoder.input", size, dtype)
    write.nodes.append(Unshuffle(layer="decoder", x=quantised, factor=1, out=entry))
    z = write.conv("from_latent", entry, c.z_channels, kernel=1)
    h = write.conv("decoder.stem", z.value, c.model_channels * c.channel_mult[-1])
    h = write.stack("decoder.middle", model.decoder.middle, h)
    h = write.stack("decoder.up", model.decoder.up, h)
    last = c.out_channels * c.unshuffle**2
    h = write.normed_conv("decoder.out_norm", "decoder.out_conv", model.decoder.out_norm, h, last)
    out = Value("decoder.out", (n, c.out_channels, height, width), torch.float32, fixed=True)
    write.nodes.append(Shuffle(layer="decoder", x=h.value, factor=c.unshuffle, out=out))
    return LoweredPart(without_unread_stats(write.nodes), x, out, quantised, codes)


class _Tower(Writer):
    """Lists of modules, one behind the other."""

    def normed_conv(self, norm: str, path: str, module: NormSiLU, x: Image, out_channels: int, **rest: Any) -> Image:
        """The convolution at ``path`` behind the norm and SiLU at ``norm``."""
        coefficients = self.coefficients(norm, module, x)
        return self.conv(path, x.value, out_channels, coefficients=coefficients, silu=True, **rest)

    def stack(self, path: str, modules: nn.Sequential, h: Image) -> Image:
        for index, module in enumerate(modules):
            here = f"{path}.{index}"
            if isinstance(module, PlainBlock):
                h = self._block(module, here, h)
            elif isinstance(module, Attention):
                h = self.attention(module, here, h)
            elif isinstance(module, Downsample) and not module.conv.padding[0]:
                h = self.conv(f"{here}.conv", h.value, module.conv.out_channels, stride=2)
            elif isinstance(module, Upsample):
                h = self.conv(f"{here}.conv", h.value, module.conv.out_channels, upsample=True)
            else:
                raise TypeError(f"lower: {here} is a {type(module).__name__}, which has no lowering")
        return h

    def _block(self, block: PlainBlock, path: str, x: Image) -> Image:
        channels = block.conv1.out_channels
        h = self.normed_conv(f"{path}.norm1", f"{path}.conv1", block.norm1, x, channels)
        if isinstance(block.skip, nn.Identity):
            return self.normed_conv(f"{path}.norm2", f"{path}.conv2", block.norm2, h, channels, residual=x.value)
        both = (Weight(f"{path}.conv2.bias", "vector"), Weight(f"{path}.skip.bias", "vector"))
        weight = Weight(f"{path}.skip.weight", "matrix")
        return self.normed_conv(
            f"{path}.norm2", f"{path}.conv2", block.norm2, h, channels, shortcut=x.value, shortcut_weight=weight,
            bias=both,
        )  # fmt: skip
