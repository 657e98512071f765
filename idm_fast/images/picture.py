"""``Picture``: decoded pixels plus everything needed to write them back the way they came."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from idm_fast.errors import IdmFastError
from idm_fast.images.limits import check_size

FloatArray = npt.NDArray[np.float32]

_GREY_MODES = frozenset({"1", "L", "LA", "La", "I", "I;16", "I;16B", "I;16L", "F"})
_SCALES = {np.dtype(np.uint8): 255.0, np.dtype(np.uint16): 65535.0}


@dataclass
class Picture:
    """One decoded picture.

    ``pixels``: float32 [H, W, 3], RGB, 0..1, in the file's own colour space (``icc`` says which), upright.
    ``alpha``: float32 [H, W], 0..1, or None. ``bit_depth``: 8 or 16, of one channel. ``mode``: the file's Pillow mode
    ("L", "RGB", "CMYK", ...; "RGB" for arrays). ``exif`` and ``icc``: bytes for the output file, the orientation tag
    already reset. ``notes``: what was converted or left out, one sentence each.
    """

    pixels: FloatArray
    alpha: FloatArray | None = None
    bit_depth: int = 8
    mode: str = "RGB"
    exif: bytes | None = None
    icc: bytes | None = None
    notes: list[str] = field(default_factory=list)
    path: Path | None = None

    @property
    def height(self) -> int:
        return int(self.pixels.shape[0])

    @property
    def width(self) -> int:
        return int(self.pixels.shape[1])

    @property
    def is_grey(self) -> bool:
        """Whether the file had one colour channel; such a picture is written with one again."""
        return self.mode in _GREY_MODES

    def with_pixels(self, pixels: FloatArray, alpha: FloatArray | None = None) -> Picture:
        """The same picture with other pixels (and alpha, when the size changed)."""
        size = pixels.shape[:2]
        if alpha is None and self.alpha is not None:
            if self.alpha.shape != size:
                raise ValueError(
                    f"with_pixels: alpha is needed for the new size {size}, old alpha is {self.alpha.shape}"
                )
            alpha = self.alpha
        return replace(self, pixels=pixels, alpha=alpha, notes=list(self.notes))

    def to_array(self, bit_depth: int | None = None) -> npt.NDArray[Any]:
        """Rounded uint8 or uint16 (``bit_depth`` 8 or 16, the picture's own when None), alpha as the last channel.

        [H, W] or [H, W, 2] when grey, else [H, W, 3] or [H, W, 4].
        """
        return quantise(self, bit_depth or self.bit_depth)


def quantise(picture: Picture, bit_depth: int, *, with_alpha: bool = True) -> npt.NDArray[Any]:
    """Rounded uint8 or uint16 array: [H, W] or [H, W, 2] when grey, else [H, W, 3] or [H, W, 4].

    Raises ``IdmFastError`` when a pixel is NaN or infinite: rounding would turn it into an arbitrary colour.
    """
    planes = picture.pixels
    check_finite(planes, str(picture.path or "picture"))
    if picture.is_grey:
        # Rec. 601, Pillow's own weights; a picture that is still grey keeps its values exactly.
        if _channels_equal(planes):
            planes = planes[..., :1]
        else:
            planes = (planes @ np.array([0.299, 0.587, 0.114], dtype=np.float32))[..., None]
    if with_alpha and picture.alpha is not None:
        planes = np.concatenate([planes, picture.alpha[..., None]], axis=2)
    top, kind = (255.0, np.uint8) if bit_depth == 8 else (65535.0, np.uint16)
    values = np.clip(planes, 0.0, 1.0) * np.float32(top)
    values += np.float32(0.5)  # truncation below then rounds to nearest
    out: npt.NDArray[Any] = values.astype(kind)
    return out[..., 0] if out.shape[2] == 1 else out


def picture_from_array(array: npt.NDArray[Any], name: str = "image") -> Picture:
    """Checks and wraps an array: uint8 (0..255), uint16 (0..65535) or float32 (0..1).

    Shapes: [H, W], [H, W, 1], [H, W, 2] (grey, alpha), [H, W, 3] RGB, [H, W, 4] RGBA.
    Raises ``IdmFastError`` naming ``name`` for another type or shape, NaN or infinite values, or values out of range.
    """
    if not isinstance(array, np.ndarray):
        raise IdmFastError(f"{name}: must be a numpy array, got {type(array).__name__}")
    if array.dtype not in _SCALES and array.dtype != np.float32:
        raise IdmFastError(f"{name}: dtype must be uint8, uint16 or float32 (0..1), got {array.dtype}")
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (1, 2, 3, 4)):
        raise IdmFastError(f"{name}: shape must be [H, W] or [H, W, 1 to 4], got {list(array.shape)}")
    check_size(array.shape[1], array.shape[0], name)
    planes = array[..., None] if array.ndim == 2 else array
    if array.dtype == np.float32:
        check_finite(planes, name)
        low, high = float(planes.min()), float(planes.max())
        if low < 0.0 or high > 1.0:
            raise IdmFastError(f"{name}: float32 values must be in 0..1, got {low:.4g} to {high:.4g}")
        bit_depth = 8
    else:
        bit_depth = 8 if array.dtype == np.uint8 else 16
    return picture_from_planes(to_float(planes), bit_depth, grey=planes.shape[2] < 3)


def picture_from_planes(planes: FloatArray, bit_depth: int, *, grey: bool) -> Picture:
    """A picture from float planes [H, W, 1 to 4] in 0..1; the second or fourth plane is alpha."""
    count = planes.shape[2]
    alpha = np.ascontiguousarray(planes[..., -1]) if count in (2, 4) else None
    color = np.repeat(planes[..., :1], 3, axis=2) if count < 3 else np.ascontiguousarray(planes[..., :3])
    return Picture(color, alpha, bit_depth, mode="L" if grey else "RGB")


def to_float(array: npt.NDArray[Any]) -> FloatArray:
    """uint8 or uint16 values as float32 in 0..1; float32 is copied."""
    scale = _SCALES.get(array.dtype)
    planes = array.astype(np.float32)
    return planes if scale is None else planes / np.float32(scale)


def check_finite(values: npt.NDArray[Any], name: str) -> None:
    """Raises ``IdmFastError`` with the count and the first position of NaN or infinite values."""
    if np.isfinite(values.sum(dtype=np.float64)):  # one pass without a mask; NaN and infinity both survive a sum
        return
    bad = ~np.isfinite(values)
    row, column = (int(i) for i in np.argwhere(bad)[0][:2])
    count = int(bad.sum())
    value = values[bad][0]
    raise IdmFastError(
        f"{name}: pixels must be finite, got {count} bad values, the first ({value}) at row {row}, column {column}"
    )


def _channels_equal(planes: FloatArray) -> bool:
    return bool((planes[..., :1] == planes[..., 1:]).all())
