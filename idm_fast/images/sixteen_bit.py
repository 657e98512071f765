"""16-bit colour, which Pillow reads as 8-bit: both halves of each sample by its own decoders.

Pillow decodes 16-bit RGB(A) files but keeps one byte of every sample; which one is a parameter of the decoder
("RGB;16B" takes the high byte of big-endian samples, "RGB;16L" of little-endian ones). Decoding twice with the two
parameters therefore gives both bytes, at C speed, for every compression that Pillow knows, and needs no further
package (a pure-Python decoder needs about a minute for a 16-megapixel PNG; a full codec package weighs 60 MB).
"""

from __future__ import annotations

import io
import struct
import sys
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

UInt16Array = npt.NDArray[np.uint16]

_ORDERS = ("16L", "16B", "16N")


def is_deep_color(image: Image.Image) -> bool:
    """Whether an opened, not yet loaded picture has 16 bits a channel and more than one channel."""
    return any(_raw_mode(tile).split(";")[-1] in _ORDERS and ";" in _raw_mode(tile) for tile in _tiles(image)) and (
        image.mode in ("RGB", "RGBA", "LA", "RGBX")
    )


def read_deep_color(path: Path) -> UInt16Array | None:
    """Samples [H, W, 2 to 4] of a 16-bit colour or grey-with-alpha PNG or TIFF; None for a layout it does not know."""
    with Image.open(path) as image:
        raw_modes = {_raw_mode(tile) for tile in _tiles(image)}
    if raw_modes == {"LA;16B"}:
        return _read_grey_alpha_png(path)
    if len(raw_modes) != 1:
        return None
    channels, order = raw_modes.pop().split(";")
    if channels not in ("RGB", "RGBA"):
        return None
    if order == "16N":
        order = "16L" if sys.byteorder == "little" else "16B"
    other = "16B" if order == "16L" else "16L"
    high = _decode(path, f"{channels};{order}")
    return _join(high, _decode(path, f"{channels};{other}"))


def _decode(path: Path, raw_mode: str) -> npt.NDArray[np.uint8]:
    with Image.open(path) as image:
        tiles: Any = image
        tiles.tile = [_with_raw_mode(tile, raw_mode) for tile in _tiles(image)]
        return np.asarray(image)


def _tiles(image: Image.Image) -> list[Any]:
    """Decoder instructions (codec, extents, offset, arguments); pictures made in memory have none."""
    return list(getattr(image, "tile", []))


def _raw_mode(tile: Any) -> str:
    arguments = tile[3]
    return str(arguments[0] if isinstance(arguments, tuple) and arguments else arguments)


def _with_raw_mode(tile: Any, raw_mode: str) -> Any:
    arguments = (raw_mode, *tile[3][1:]) if isinstance(tile[3], tuple) else raw_mode
    return tile._replace(args=arguments) if hasattr(tile, "_replace") else (*tile[:3], arguments)


def _read_grey_alpha_png(path: Path) -> UInt16Array:
    """Reads a 16-bit grey-with-alpha PNG as 8-bit RGBA: the same bytes in the same order under another header."""
    data = bytearray(path.read_bytes())
    data[24:26] = bytes((8, 6))  # IHDR: bit depth 8, colour type RGBA
    data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    with Image.open(io.BytesIO(bytes(data))) as image:
        halves = np.asarray(image)
    return _join(halves[..., 0::2], halves[..., 1::2])


def _join(high: npt.NDArray[np.uint8], low: npt.NDArray[np.uint8]) -> UInt16Array:
    samples = high.astype(np.uint16)
    samples <<= 8
    samples |= low
    return samples
