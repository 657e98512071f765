"""Reads the layers of a dlib network file (``.dat``) as numpy arrays, first layer first.

The file is dlib's stream of objects. Integers are a control byte (low four bits: how many bytes follow, high bit:
negative) and the little-endian magnitude; floats are two such integers, mantissa and binary exponent; a string is
its length and its bytes; a tensor is the integers (2, samples, channels, rows, columns) and its float32 values.
Between two layers lie a few bytes of book-keeping of dlib's nested template types. They say nothing that we need,
so the reader skips to the next layer's name, which is at most a few hundred bytes away.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from idm_fast.errors import IdmFastError

_NAMES = (b"input_rgb_image_sized", b"con_4", b"affine_", b"max_pool_2", b"avg_pool_2", b"fc_2")
_NAME = re.compile(b"|".join(re.escape(bytes([1, len(name)]) + name) for name in _NAMES))
# The nested template types are opened before the first layer: about 290 bytes in the recognition network.
_LONGEST_GAP = 1024

FloatArray = np.ndarray[Any, np.dtype[np.float32]]


@dataclass(frozen=True)
class DlibLayer:
    """One layer: ``kind`` (``input``, ``con``, ``affine``, ``max_pool``, ``avg_pool``, ``fc``) and what it holds.

    ``arrays``: con (weight [O, I, h, w], bias [O]), affine (gamma [C], beta [C]), fc (weight [inputs, outputs]),
    input (means of red, green, blue in 0..255 [3]). ``window``, ``stride``, ``padding`` are square sides in
    pixels; a window of 0 means the whole plane.
    """

    kind: str
    arrays: tuple[FloatArray, ...] = ()
    window: int = 0
    stride: int = 1
    padding: int = 0


class _Reader:
    def __init__(self, data: bytes) -> None:
        self.data = data
        self.position = 0

    def integer(self) -> int:
        control = self.data[self.position]
        size = control & 0x0F
        if control & 0x70 or not 1 <= size <= 8:
            raise ValueError(f"byte {self.position} is not the control byte of an integer")
        start = self.position + 1
        self.position = start + size
        if self.position > len(self.data):
            raise ValueError("the file ends inside an integer")
        value = int.from_bytes(self.data[start : self.position], "little")
        return -value if control & 0x80 else value

    def real(self) -> float:
        mantissa, exponent = self.integer(), self.integer()
        if not -1100 <= exponent <= 1100:  # dlib marks infinities and NaN by exponents of 32000 and above
            raise ValueError("a finite number was expected")
        return math.ldexp(mantissa, exponent)

    def tensor(self) -> FloatArray:
        if self.integer() != 2:
            raise ValueError("tensor version must be 2")
        shape = [self.integer() for _ in range(4)]
        count = math.prod(shape)
        if min(shape) < 0 or self.position + 4 * count > len(self.data):
            raise ValueError(f"tensor {shape} does not fit into the file")
        values = np.frombuffer(self.data, "<f4", count, self.position).astype(np.float32)
        self.position += 4 * count
        return values

    def next_name(self) -> str | None:
        found = _NAME.search(self.data, self.position, self.position + _LONGEST_GAP)
        if found is None:
            return None
        self.position = found.end()
        return found.group()[2:].decode()

    def square(self, what: str) -> int:
        rows, columns = self.integer(), self.integer()
        if rows != columns:
            raise ValueError(f"{what} must be square, got {rows} x {columns}")
        return rows


def _read(reader: _Reader, name: str) -> DlibLayer:
    if name == "input_rgb_image_sized":
        return DlibLayer("input", (np.array([reader.real() for _ in range(3)], np.float32),))
    if name == "affine_":
        gamma, beta = np.split(reader.tensor(), 2)
        return DlibLayer("affine", (gamma, beta))
    if name == "fc_2":
        outputs, inputs = reader.integer(), reader.integer()
        return DlibLayer("fc", (reader.tensor()[: inputs * outputs].reshape(inputs, outputs),))
    if name == "con_4":
        params, filters = reader.tensor(), reader.integer()
        window, stride, padding = reader.square("kernel"), reader.square("stride"), reader.square("padding")
        # The parameters are all kernels followed by one bias a filter.
        weight = params[:-filters].reshape(filters, -1, window, window)
        return DlibLayer("con", (weight, params[-filters:]), window, stride, padding)
    window, stride, padding = reader.square("window"), reader.square("stride"), reader.square("padding")
    return DlibLayer(name.removesuffix("_2"), (), window, stride, padding)


def _layers(reader: _Reader) -> Iterator[DlibLayer]:
    while (name := reader.next_name()) is not None:
        yield _read(reader, name)


def read_dlib_layers(path: str | Path) -> list[DlibLayer]:
    """The layers with contents in ``path``, in the order in which an image passes through them.

    Raises ``IdmFastError`` naming the file when it cannot be read or is not a dlib network of these layers.
    """
    try:
        layers = list(_layers(_Reader(Path(path).read_bytes())))
    except OSError as error:
        raise IdmFastError(f"{path}: cannot be read: {error.strerror or error}") from error
    except (ValueError, IndexError) as error:
        raise IdmFastError(f"{path}: is not a readable dlib network: {error}") from error
    if not layers:
        raise IdmFastError(f"{path}: is not a dlib network: no layer found")
    return layers
