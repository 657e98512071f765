"""Before and after, side by side and labelled."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from idm_fast.images import Picture, picture_from_array

_BAR = 0.05  # height of the label bar, as a part of the picture's height
_MAX_SIDE, _MAX_PIXELS = 12_000, 16_000_000  # of one half: two of them must fit in one file, and in a viewer


def side_by_side(before: Picture, after: Picture, labels: tuple[str, str] = ("input", "restored")) -> Picture:
    """One 8-bit RGB picture, ``before`` on the left brought to the size of ``after``; text in a bar above each.

    Transparency is laid over white. Very large pictures are shrunk: the sheet is for looking at.
    """
    right, left = _rgb(after), _rgb(before)
    shrink = min(1.0, _MAX_SIDE / max(right.size), (_MAX_PIXELS / (right.width * right.height)) ** 0.5)
    size = (max(1, round(right.width * shrink)), max(1, round(right.height * shrink)))
    left, right = (half if half.size == size else half.resize(size, Image.Resampling.BICUBIC) for half in (left, right))
    bar = max(16, round(right.height * _BAR))
    gap = max(2, right.width // 200)
    sheet = Image.new("RGB", (2 * right.width + gap, right.height + bar), "white")
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(size=0.7 * bar)
    for x, picture, label in ((0, left, labels[0]), (right.width + gap, right, labels[1])):
        sheet.paste(picture, (x, bar))
        draw.text((x + bar // 3, bar // 2), label, fill="black", font=font, anchor="lm")
    made = picture_from_array(np.asarray(sheet))
    made.icc = None if after.is_grey else after.icc  # the profile of a grey picture does not fit RGB
    return made


def _rgb(picture: Picture) -> Image.Image:
    pixels = picture.pixels
    if picture.alpha is not None:
        weight = picture.alpha[..., None]
        pixels = pixels * weight + (1 - weight)
    values = np.clip(pixels, 0, 1) * 255 + 0.5
    return Image.fromarray(values.astype(np.uint8))
