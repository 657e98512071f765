"""Writes TIFF: Pillow has no 16-bit colour in it, and leaves out Exif and GPS data wherever it compresses."""

from __future__ import annotations

import struct
import zlib
from typing import IO, Any

import numpy as np
import numpy.typing as npt
from PIL import ExifTags, Image, TiffImagePlugin


def write_tiff(file: IO[bytes], samples: npt.NDArray[Any], *, exif: bytes | None, icc: bytes | None) -> None:
    """Writes uint8 or uint16 [H, W] or [H, W, 2 to 4] as TIFF 6.0: one Deflate strip, unassociated alpha.

    ``exif``: its first directory becomes part of the picture's own, as TIFF has it, with Exif and GPS data below.
    """
    planes = samples[..., None] if samples.ndim == 2 else samples
    height, width, channels = planes.shape
    strip = zlib.compress(np.ascontiguousarray(planes.astype(samples.dtype.newbyteorder("<"))).tobytes(), 6)
    tags = TiffImagePlugin.ImageFileDirectory_v2()  # little-endian
    for tag, value in _exif_tags(exif).items():
        tags[tag] = value
    tags[256], tags[257] = width, height
    tags[258] = (8 * samples.dtype.itemsize,) * channels  # bits per sample
    tags[259] = 8  # compression: Deflate
    tags[262] = 1 if channels < 3 else 2  # black is zero, or RGB
    tags[273] = 0  # the strip's place, which Pillow counts from the end of the directory
    tags[277] = channels
    tags[278] = height  # rows per strip
    tags[279] = len(strip)
    tags[284] = 1  # planar configuration: interleaved
    if channels in (2, 4):
        tags[338] = 2  # extra sample: unassociated alpha
    if icc:
        tags[34675] = icc
    start = struct.pack("<2sHI", b"II", 42, 8)
    file.write(start + tags.tobytes(len(start)) + strip)


def _exif_tags(exif: bytes | None) -> dict[int, Any]:
    """The first directory of EXIF data; the value of a directory below it is itself a dictionary."""
    if not exif:
        return {}
    read = Image.Exif()
    read.load(exif)
    below = {tag: read.get_ifd(tag) for tag in (ExifTags.IFD.Exif, ExifTags.IFD.GPSInfo)}
    if interop := read.get_ifd(ExifTags.IFD.Interop):
        below[ExifTags.IFD.Exif] = below[ExifTags.IFD.Exif] | {ExifTags.IFD.Interop: interop}
    return dict(read.items()) | {int(tag): values for tag, values in below.items() if values}
