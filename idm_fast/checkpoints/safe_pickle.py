"""Reads pickles of numpy arrays without executing anything that is in them.

A pickle is a program: it may import any global and call it. Here only what a numpy array needs is admitted, and
even that is answered by stand-ins of our own, so numpy's own (trusting) reconstruction code is never fed from
the file. What comes back is made of dict, list, tuple, str, bytes, numbers and numeric arrays.
"""

from __future__ import annotations

import io
import pickle
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np

from idm_fast.errors import IdmFastError

_NUMERIC_KINDS = "biufc"
_PLAIN = (str, bytes, bytearray, int, float, complex, type(None))


class _Dtype:
    """Stands for ``numpy.dtype``: numeric types only, never objects, records or sub-arrays."""

    def __init__(self, code: str, align: bool = False, copy: bool = False) -> None:
        if not isinstance(code, str):
            raise pickle.UnpicklingError(f"array type must be a type code, got {type(code).__name__}")
        self.dtype = np.dtype(code)
        if self.dtype.kind not in _NUMERIC_KINDS:
            raise pickle.UnpicklingError(f"array type must be numeric, got {code!r}")

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        byte_order, sub_array, names, fields = state[1:5]
        if byte_order not in ("<", ">", "|", "=") or any(part is not None for part in (sub_array, names, fields)):
            raise pickle.UnpicklingError("array type must be a plain number, got a record or sub-array")
        if byte_order in "<>":
            self.dtype = self.dtype.newbyteorder(byte_order)


class _ArrayType:
    """Stands for the class ``numpy.ndarray``, which a pickle only passes on to ``_reconstruct``."""


class _Array:
    """Stands for one array until its bytes are known."""

    value: np.ndarray[Any, Any] | None = None

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, dtype, fortran_order, raw = state
        if not isinstance(dtype, _Dtype) or not isinstance(raw, bytes):
            raise pickle.UnpicklingError("array must hold the bytes of numbers")
        if not all(isinstance(side, int) and side >= 0 for side in shape):
            raise pickle.UnpicklingError(f"array shape must be non-negative integers, got {shape!r}")
        expected = dtype.dtype.itemsize
        for side in shape:
            expected *= side
        if len(raw) != expected:
            raise pickle.UnpicklingError(f"array {tuple(shape)} must hold {expected} bytes, got {len(raw)}")
        flat = np.frombuffer(raw, dtype=dtype.dtype)
        self.value = flat.reshape(shape, order="F" if fortran_order else "C").copy()


def _reconstruct(array_type: Any, shape: Any, code: Any) -> _Array:
    return _Array()


def _encode(text: str, encoding: str = "latin1") -> bytes:
    # Pickle protocols below 3 have no bytes opcode and store them as latin-1 text plus this call.
    return text.encode("latin1")


def _no_bytes() -> bytes:
    # Those protocols store empty bytes as a call of ``bytes`` without arguments; with one it could allocate at will.
    return b""


_ADMITTED: dict[tuple[str, str], Any] = {
    ("numpy", "dtype"): _Dtype,
    ("numpy", "ndarray"): _ArrayType,
    ("numpy.core.multiarray", "_reconstruct"): _reconstruct,
    ("numpy._core.multiarray", "_reconstruct"): _reconstruct,
    ("_codecs", "encode"): _encode,
    ("__builtin__", "bytes"): _no_bytes,
    ("collections", "OrderedDict"): OrderedDict,
}


class _Refused(pickle.UnpicklingError):
    """The pickle asks for a global that is not admitted."""


class _RestrictedUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        try:
            return _ADMITTED[module, name]
        except KeyError:
            raise _Refused(f"refused the global {module}.{name}, which is not part of a numpy array") from None


def _plain(value: Any) -> Any:
    if isinstance(value, _Array):
        if value.value is None:
            raise pickle.UnpicklingError("array without contents")
        return value.value
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_plain(item) for item in value)
    if isinstance(value, _PLAIN):
        return value
    raise pickle.UnpicklingError(f"refused a value of type {type(value).__name__}")


def load_arrays(path: str | Path) -> Any:
    """The tree of containers and numpy arrays pickled in ``path``; nothing in the file is executed.

    Raises ``IdmFastError`` naming the file, and the global when the pickle asks for one that is not admitted.
    """
    try:
        data = Path(path).read_bytes()
        return _plain(_RestrictedUnpickler(io.BytesIO(data)).load())
    except OSError as error:
        raise IdmFastError(f"{path}: cannot be read: {error.strerror or error}") from error
    except _Refused as error:
        raise IdmFastError(f"{path}: {error}") from error
    except Exception as error:  # a damaged pickle raises nearly any type: EOFError, KeyError, TypeError, ...
        raise IdmFastError(f"{path}: is not a readable pickle of numpy arrays: {error}") from error
