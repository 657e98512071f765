"""Writes a ``Picture`` atomically, with the depth, grey, alpha and metadata that the output format can hold."""

from __future__ import annotations

import contextlib
import io
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from idm_fast.errors import IdmFastError
from idm_fast.files import atomic_file
from idm_fast.images.limits import WRITABLE
from idm_fast.images.picture import Picture, quantise
from idm_fast.images.png import write_png
from idm_fast.images.tiff import write_tiff

_WITH_ALPHA = frozenset({"PNG", "WEBP", "TIFF"})
_WITH_16_BIT = frozenset({"PNG", "TIFF"})
_WITH_METADATA = frozenset({"PNG", "JPEG", "WEBP", "TIFF"})
_MAX_JPEG_EXIF = 65_533 - 6  # one JPEG segment, less its header
_MAX_SIDE = {"JPEG": 65_500, "WEBP": 16_383}  # libjpeg's and WebP's own limits


def output_format(path: str | Path) -> str:
    """Pillow's name of the format that the extension of ``path`` asks for; raises ``IdmFastError`` for others."""
    suffix = Path(path).suffix.lower()
    if suffix not in WRITABLE:
        raise IdmFastError(f"{path}: output extension must be one of {' '.join(WRITABLE)}, got {suffix or 'none'}")
    return WRITABLE[suffix]


def write_image(picture: Picture, path: str | Path, *, quality: int = 95) -> list[str]:
    """Writes ``picture`` in the format of the extension; returns notes on what the format could not hold.

    Values are rounded to nearest. ``quality`` (1 to 100) is for JPEG, written 4:4:4, and WebP. The file appears whole
    or not at all. Raises ``IdmFastError`` when the folder is missing or not writable, a value is not finite, or the
    format cannot hold the picture.
    """
    path = Path(path)
    samples, picture, notes = _prepared(picture, path)
    with atomic_file(path) as file:
        _encode(file, samples, picture, output_format(path), quality, quick=False)
    return notes


def encode_image(picture: Picture, path: str | Path, *, quality: int = 95) -> bytes:
    """The bytes of ``picture`` in the format of the extension, for a caller who places the file; as ``write_image``.

    PNG is packed without a search for repeats, which photographs hardly have: see ``write_png``.
    """
    path = Path(path)
    samples, picture, _ = _prepared(picture, path)
    file = io.BytesIO()
    try:
        _encode(file, samples, picture, output_format(path), quality, quick=True)
    except OSError as error:  # the encoder's own: no disk has a part in it
        raise IdmFastError(f"{path}: cannot be encoded as {output_format(path)}: {error}") from None
    return file.getvalue()


def _prepared(picture: Picture, path: Path) -> tuple[npt.NDArray[Any], Picture, list[str]]:
    """(rounded samples, the picture that they and the metadata are of, notes) for the format of ``path``."""
    kind = output_format(path)
    limit = _MAX_SIDE.get(kind)
    if limit is not None and max(picture.width, picture.height) > limit:
        raise IdmFastError(
            f"{path}: {kind} holds at most {limit:,} pixels a side, got {picture.width} x {picture.height}; use .png"
        )
    notes: list[str] = []
    bit_depth = picture.bit_depth
    if bit_depth == 16 and kind not in _WITH_16_BIT:
        notes.append(f"{kind} holds 8 bits a channel; the 16-bit picture was rounded to 8")
        bit_depth = 8
    if picture.alpha is not None and kind not in _WITH_ALPHA:
        notes.append(f"{kind} holds no transparency; the picture was laid over white")
        picture = _over_white(picture)
    samples = quantise(picture, bit_depth)
    if kind not in _WITH_METADATA and (picture.exif or picture.icc):
        notes.append(f"{kind} holds no EXIF data or colour profile; they were left out")
    if kind == "JPEG" and len(picture.exif or b"") > _MAX_JPEG_EXIF:
        notes.append("the EXIF data are too large for JPEG; they were left out")
        picture = replace(picture, exif=None)
    return samples, picture, notes


def _encode(file: IO[bytes], samples: npt.NDArray[Any], picture: Picture, kind: str, quality: int, quick: bool) -> None:
    if kind == "TIFF":
        if samples.dtype == np.uint16 and samples.shape[2:] == (2,):  # which hardly any program reads
            samples = samples[..., [0, 0, 0, 1]]
        write_tiff(file, samples, exif=picture.exif, icc=picture.icc)
    elif samples.dtype == np.uint16 or (kind == "PNG" and quick):
        write_png(file, samples, exif=picture.exif, icc=picture.icc, quick=quick)
    else:
        _write_with_pillow(file, samples, kind, picture, quality)


def copy_file(source: str | Path, target: str | Path) -> None:
    """Copies a file byte for byte, atomically; for pictures in which nothing was changed."""
    with open_for_copy(Path(source)) as reader, atomic_file(Path(target)) as writer:
        shutil.copyfileobj(reader, writer, 1 << 20)


@contextlib.contextmanager
def open_for_copy(path: Path) -> Iterator[IO[bytes]]:
    try:
        file = path.open("rb")
    except OSError as error:
        raise IdmFastError(f"{path}: expected a readable file, got {error.strerror or error}") from error
    with file:
        yield file


def _over_white(picture: Picture) -> Picture:
    assert picture.alpha is not None
    weight = picture.alpha[..., None]
    laid: npt.NDArray[np.float32] = picture.pixels * weight + (1.0 - weight)
    flat = picture.with_pixels(laid)
    flat.alpha = None
    return flat


def _write_with_pillow(file: IO[bytes], samples: npt.NDArray[Any], kind: str, picture: Picture, quality: int) -> None:
    options: dict[str, Any] = {}
    if kind in _WITH_METADATA:
        options = {name: data for name, data in (("exif", picture.exif), ("icc_profile", picture.icc)) if data}
    if kind == "JPEG":
        options |= {"quality": quality, "subsampling": 0}
    elif kind == "WEBP":
        options |= {"quality": quality}
    image = Image.fromarray(samples)
    try:
        image.save(file, kind, **options)
    except (ValueError, TypeError, KeyError, MemoryError) as error:
        text = " ".join(str(error).split()) or type(error).__name__
        raise IdmFastError(f"{picture.path or 'picture'}: expected data that {kind} can hold, got: {text}") from error
