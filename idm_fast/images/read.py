"""Reads a picture file into a ``Picture``: upright, RGB, float, with everything else noted or carried over."""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import ExifTags, Image, ImageCms, UnidentifiedImageError

from idm_fast.errors import IdmFastError
from idm_fast.images.limits import MAX_PIXELS, READABLE, check_size
from idm_fast.images.picture import Picture, picture_from_planes, to_float
from idm_fast.images.sixteen_bit import is_deep_color, read_deep_color

Image.init()  # fills Image.OPEN; some builds of Pillow lack AVIF or JPEG 2000
_FORMATS = sorted(set(READABLE.values()) & set(Image.OPEN))  # MPO is not listed there: it is opened as JPEG
_ORIENTATION = ExifTags.Base.Orientation
# TIFF structure tags describe how one file stores its samples; carried into another file they would be lies.
_STRUCTURE_TAGS = frozenset(
    {254, 255, 256, 257, 258, 259, 262, 266, 273, 277, 278, 279, 280, 281, 284, 317, 318, 319, 320, 321}
    | {322, 323, 324, 325, 330, 338, 339, 347, 512, 513, 514, 529, 530, 531, 532, 700, 33723, 34377, 34675}
)


def read_image(path: str | Path) -> Picture:
    """Decodes the first frame of a picture file.

    Raises ``IdmFastError`` (one line: file, expected, actual) when the file is missing, a directory, unreadable,
    empty, truncated, no picture, or too large.
    """
    path = Path(path)
    _check_file(path)
    with _one_line_errors(path):
        picture = _decode(path)
    picture.path = path
    return picture


def picture_from_pil(image: Image.Image, name: str = "image") -> Picture:
    """A ``Picture`` from a Pillow image, treated like a file that holds it. Raises ``IdmFastError`` as for files."""
    check_size(image.width, image.height, name)
    with _one_line_errors(Path(name)):
        return _from_pil(image, [], None)


def image_size(path: str | Path) -> tuple[int, int]:
    """(width, height) from the file's header, without decoding; raises ``IdmFastError`` like ``read_image``."""
    path = Path(path)
    _check_file(path)
    with _one_line_errors(path), _quiet_open(path) as image:
        return image.size


def _check_file(path: Path) -> None:
    try:
        if path.is_dir():
            raise IdmFastError(f"{path}: expected a picture file, got a directory")
        if path.exists() and not path.is_file():
            raise IdmFastError(f"{path}: expected a picture file, got a device, socket or pipe")
        with path.open("rb") as file:
            head = file.read(1)
    except IdmFastError:  # is a ValueError too
        raise
    except FileNotFoundError:
        raise IdmFastError(f"{path}: expected a picture file, got no such file") from None
    except PermissionError:
        raise IdmFastError(f"{path}: expected a readable picture file, got permission denied") from None
    except (OSError, ValueError) as error:  # ValueError: a NUL character in the name
        raise IdmFastError(f"{path}: expected a readable picture file, got {_reason(error)}") from error
    if not head:
        raise IdmFastError(f"{path}: expected a picture file, got an empty file (0 bytes)")


@contextlib.contextmanager
def _one_line_errors(path: Path) -> Iterator[None]:
    """Turns whatever a decoder raises for a broken file into an ``IdmFastError`` that names the file."""
    try:
        yield
    except IdmFastError:
        raise
    except UnidentifiedImageError:
        raise IdmFastError(f"{path}: expected a picture ({', '.join(_FORMATS)}), got {_describe(path)}") from None
    except Image.DecompressionBombError as error:
        raise IdmFastError(
            f"{path}: picture must have at most {MAX_PIXELS:,} pixels, got more: {_reason(error)}"
        ) from None
    except MemoryError:
        raise IdmFastError(f"{path}: expected a picture that fits in memory, got none left while decoding") from None
    except (
        Exception
    ) as error:  # decoders raise nearly every type (struct.error, SyntaxError, KeyError, ...) on bad bytes
        raise IdmFastError(
            f"{path}: expected a complete picture, got one that cannot be decoded: {_reason(error)}"
        ) from error


@contextlib.contextmanager
def _quiet_open(path: Path) -> Iterator[Image.Image]:
    """Opens with the safe formats only; our own size limit replaces Pillow's warning."""
    with warnings.catch_warnings():
        # Damaged metadata and "might be a decompression bomb" are not worth a message when the pixels are fine.
        warnings.simplefilter("ignore")
        with Image.open(path, formats=_FORMATS) as image:
            check_size(image.width, image.height, str(path))
            yield image


def _decode(path: Path) -> Picture:
    notes: list[str] = []
    with _quiet_open(path) as image:
        expected = READABLE.get(path.suffix.lower())
        if expected is not None and image.format not in (expected, "MPO"):
            notes.append(f"the name ends in {path.suffix} but the content is {image.format}")
        frames = getattr(image, "n_frames", 1)
        if frames > 1:
            notes.append(f"holds {frames} frames or pages; only the first is used")
        deep = read_deep_color(path) if is_deep_color(image) and frames == 1 else None
        if deep is None and is_deep_color(image):
            notes.append("16-bit colour in this layout is read as 8-bit")
        return _from_pil(image, notes, deep)


def _from_pil(image: Image.Image, notes: list[str], deep: npt.NDArray[np.uint16] | None) -> Picture:
    """The picture in ``image``; ``deep`` replaces its samples where Pillow would keep only 8 of 16 bits."""
    mode = image.mode
    exif, orientation = _carried_exif(image)
    icc = image.info.get("icc_profile") or None
    if deep is not None:
        grey = deep.shape[2] == 2
        picture = picture_from_planes(to_float(deep), 16, grey=grey)
        mode = "LA" if grey else mode
    elif mode in ("I", "I;16", "I;16B", "I;16L", "I;16N", "F"):
        picture = _grey_from_numbers(np.asarray(image), mode, notes)
    else:
        rgb, icc = _to_rgb_or_grey(image, icc, notes)
        values = np.asarray(rgb)
        planes = values[..., None] if values.ndim == 2 else values
        picture = picture_from_planes(to_float(planes), 8, grey=rgb.mode in ("L", "LA"))
    picture.pixels = _upright(picture.pixels, orientation)
    if picture.alpha is not None:
        picture.alpha = _upright(picture.alpha, orientation)
    picture.mode, picture.exif, picture.icc, picture.notes = mode, exif, icc, notes
    return picture


def _to_rgb_or_grey(image: Image.Image, icc: bytes | None, notes: list[str]) -> tuple[Image.Image, bytes | None]:
    """The picture in mode L, LA, RGB or RGBA, and the colour profile that still describes it."""
    if image.mode in ("L", "LA", "RGB", "RGBA") and "transparency" not in image.info:
        return image, icc
    if image.mode == "CMYK":
        notes.append("converted from CMYK to RGB")
        return _cmyk_to_rgb(image, icc), None
    if image.mode in ("1", "La") or (image.mode == "L" and "transparency" in image.info):
        return image.convert("LA" if image.has_transparency_data else "L"), icc
    if image.mode == "RGBX":
        return image.convert("RGB"), icc
    target = "RGBA" if image.has_transparency_data else "RGB"
    if image.mode not in ("RGB", "P", "PA", "RGBa"):
        notes.append(f"converted from {image.mode} to {target}")
        icc = None
    return image.convert(target), icc


def _cmyk_to_rgb(image: Image.Image, icc: bytes | None) -> Image.Image:
    """By the embedded profile to sRGB where there is a usable one, else by Pillow's plain formula."""
    if icc:
        with contextlib.suppress(ImageCms.PyCMSError, OSError):  # a damaged profile is no reason to lose the picture
            converted = ImageCms.profileToProfile(
                image, ImageCms.ImageCmsProfile(io.BytesIO(icc)), ImageCms.createProfile("sRGB"), outputMode="RGB"
            )
            if converted is not None:
                return converted
    return image.convert("RGB")


def _grey_from_numbers(values: npt.NDArray[Any], mode: str, notes: list[str]) -> Picture:
    """Single-channel numbers: 16-bit integers, 32-bit integers within 16 bits, or floats within 0..1."""
    low, high = float(values.min()), float(values.max())
    if mode == "F":
        if not (np.isfinite(values).all() and low >= 0.0 and high <= 1.0):
            raise IdmFastError(f"floating-point samples must be in 0..1, got {low:.4g} to {high:.4g}")
        notes.append("floating-point samples are kept to 16 bits")
        planes = values.astype(np.float32)
    else:
        if low < 0 or high > 65535:
            raise IdmFastError(f"integer samples must be in 0..65535, got {low:.0f} to {high:.0f}")
        planes = to_float(values.astype(np.uint16))
    return picture_from_planes(planes[..., None], 16, grey=True)


def _carried_exif(image: Image.Image) -> tuple[bytes | None, int]:
    """EXIF for the output file (upright, without structure tags and thumbnail) and the input's orientation, 1 to 8."""
    try:
        exif = image.getexif()
        value = exif.get(_ORIENTATION, 1)
        orientation = value if isinstance(value, int) and 1 <= value <= 8 else 1
        for tag in [tag for tag in exif if tag in _STRUCTURE_TAGS or tag == _ORIENTATION]:
            del exif[tag]
        return (exif.tobytes() if len(exif) else None), orientation
    except Exception:  # damaged metadata raises nearly every type, and must not cost the pixels
        return None, 1


def _upright(planes: npt.NDArray[np.float32], orientation: int) -> npt.NDArray[np.float32]:
    """Undoes the EXIF orientation (TIFF 6.0, tag 274): 2, 4, 5, 7 are mirrored, 3, 6, 8 turned."""
    if orientation in (5, 6, 7, 8):
        planes = planes.swapaxes(0, 1)
    if orientation in (2, 3, 6, 7):
        planes = planes[:, ::-1]
    if orientation in (3, 4, 7, 8):
        planes = planes[::-1]
    return np.ascontiguousarray(planes)


def _describe(path: Path) -> str:
    """What a file that is no picture seems to be, by its first bytes."""
    try:
        with path.open("rb") as file:
            head = file.read(64)
    except OSError:
        return "something else"
    known = {
        b"%PDF": "a PDF document", b"PK\x03\x04": "a ZIP archive", b"\x1f\x8b": "gzip data", b"<svg": "an SVG drawing",
        b"<?xml": "XML", b"<!DOC": "a web page", b"<html": "a web page", b"%!PS": "PostScript",
    }  # fmt: skip
    for start, what in known.items():
        if head.startswith(start):
            return what
    if head[4:8] == b"ftyp":
        return f"an ISO media file of brand {head[8:12].decode('ascii', 'replace')!r} (HEIC must be converted first)"
    if head.isascii() and head.decode("ascii").isprintable():
        return "text"
    return f"a file that begins with the bytes {head[:8].hex(' ')}"


def _reason(error: BaseException) -> str:
    """The message of an exception on one line."""
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return " ".join(str(text).split())
