"""A latent mask as a picture: where on a face, and in which channels, identity guidance may change something."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from idm_fast.files import atomic

_TILE, _GAP, _LABEL, _SCALE = 256, 12, 22, 14  # px: a tile's side, between tiles, a line of text, the colour scale
_COLUMNS = 3
# From nothing to all: dark blue, purple, orange, pale yellow, each lighter than the one before.
_COLOURS = np.array([(10, 10, 45), (95, 25, 120), (205, 65, 80), (250, 155, 50), (252, 250, 190)], dtype=np.float64)
_OPACITY = 0.6  # of the heat over the face


def heat(values: Tensor) -> Tensor:
    """Colours uint8 [h, w, 3] of ``values`` [h, w] in [0, 1]."""
    steps = np.linspace(0, 1, len(_COLOURS))
    flat = values.detach().cpu().double().clamp(0, 1).numpy()
    colours = np.stack([np.interp(flat, steps, _COLOURS[:, c]) for c in range(3)], axis=-1)
    return torch.from_numpy((colours + 0.5).astype(np.uint8))


def draw_mask(mask: Tensor, face: Tensor, path: Path) -> None:
    """Writes a PNG: ``face`` [3, S, S] in [-1, 1], the mean of ``mask`` [D, h, w] over it, that mean, each channel.

    One scale of colours from 0 to 1 for all of them; a tile's title has its mean.
    """
    mask, face = mask.detach().cpu().float(), face.detach().cpu().float()
    mean = mask.mean(0)
    plain = _resized(((face + 1) * 127.5 + 0.5).clamp(0, 255).byte().permute(1, 2, 0), Image.Resampling.BICUBIC)
    smooth = F.interpolate(mean[None, None], size=(_TILE, _TILE), mode="bilinear", align_corners=False)[0, 0]
    over = Image.blend(plain, Image.fromarray(heat(smooth).numpy()), _OPACITY)
    tiles = [("face", plain), ("mean mask over it", over), (f"mean of channels, {float(mean.mean()):.2f}", _heat(mean))]
    tiles += [(f"channel {i}, {float(channel.mean()):.2f}", _heat(channel)) for i, channel in enumerate(mask)]
    rows = math.ceil(len(tiles) / _COLUMNS)
    height, width = rows * (_TILE + _LABEL + _GAP), _COLUMNS * (_TILE + _GAP) + _GAP
    sheet = Image.new("RGB", (width, height + _SCALE + _LABEL + _GAP), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(14)
    for index, (title, tile) in enumerate(tiles):
        left, top = _GAP + index % _COLUMNS * (_TILE + _GAP), index // _COLUMNS * (_TILE + _LABEL + _GAP)
        pen.text((left, top + 3), title, fill="#222222", font=font)
        sheet.paste(tile, (left, top + _LABEL))
    scale = heat(torch.linspace(0, 1, _TILE).expand(_SCALE, -1))
    sheet.paste(Image.fromarray(scale.numpy()), (_GAP, height))
    pen.text((_GAP, height + _SCALE + 2), "0: stays as it is", fill="#222222", font=font)
    pen.text((_GAP + _TILE, height + _SCALE + 2), "1: guided in full", fill="#222222", font=font, anchor="ra")
    with atomic(path) as temporary:
        sheet.save(temporary, format="PNG", optimize=True)


def _heat(values: Tensor) -> Image.Image:
    return _resized(heat(values), Image.Resampling.NEAREST)


def _resized(pixels: Tensor, how: Image.Resampling) -> Image.Image:
    return Image.fromarray(np.ascontiguousarray(pixels.numpy())).resize((_TILE, _TILE), how)
