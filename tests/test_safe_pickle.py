"""A pickle of arrays is read; one that wants to do anything else is refused by name."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from idm_fast.checkpoints.safe_pickle import load_arrays
from idm_fast.errors import IdmFastError


class _Calls:
    """Unpickling this calls ``function(*arguments)``."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.reduced = (function, arguments)

    def __reduce__(self) -> Any:
        return self.reduced


def _dump(path: Path, value: Any, protocol: int = 3) -> Path:
    path.write_bytes(pickle.dumps(value, protocol=protocol))
    return path


@pytest.mark.parametrize("protocol", [2, 3, 4])
def test_tree_of_arrays_survives(tmp_path: Path, protocol: int) -> None:
    tree: dict[str, Any] = {
        "conv": {"kernel": np.arange(24, dtype=np.float32).reshape(2, 3, 4), "big": np.array([1.5], ">f8")},
        "list": [1, 2.5, "text", None, True, (3, b"bytes")],
        "fortran": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
        "empty": np.zeros((0, 4), np.int16),
    }
    loaded = load_arrays(_dump(tmp_path / "a.ckpt", tree, protocol))
    np.testing.assert_array_equal(loaded["conv"]["kernel"], tree["conv"]["kernel"])
    assert loaded["conv"]["big"][0] == 1.5
    assert loaded["list"] == tree["list"]
    np.testing.assert_array_equal(loaded["fortran"], tree["fortran"])
    assert loaded["empty"].shape == (0, 4)


def test_a_call_of_the_system_is_refused_by_name(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    path = _dump(tmp_path / "evil.ckpt", {"weights": _Calls(os.system, f"touch {victim}")})
    with pytest.raises(IdmFastError, match=r"evil\.ckpt.*refused the global (posix|nt)\.system"):
        load_arrays(path)
    assert not victim.exists()


@pytest.mark.parametrize("function", [eval, getattr, np.load, np.fromfile, pickle.loads])
def test_other_callables_are_refused(tmp_path: Path, function: Any) -> None:
    with pytest.raises(IdmFastError, match="refused the global"):
        load_arrays(_dump(tmp_path / "evil.ckpt", _Calls(function, "1")))


def test_an_array_of_objects_is_refused(tmp_path: Path) -> None:
    with pytest.raises(IdmFastError, match="array type must be numeric"):
        load_arrays(_dump(tmp_path / "objects.ckpt", np.array([{}, {}], dtype=object)))


def test_a_record_array_is_refused(tmp_path: Path) -> None:
    with pytest.raises(IdmFastError, match="array type must be"):
        load_arrays(_dump(tmp_path / "records.ckpt", np.zeros(2, dtype=[("a", "f4"), ("b", "i4")])))


def test_an_array_that_claims_more_than_it_holds_is_refused(tmp_path: Path) -> None:
    path = _dump(tmp_path / "short.ckpt", np.zeros(4, np.float32))
    data = path.read_bytes()
    assert data.count(b"K\x04\x85") == 1  # the shape, a tuple of the one number 4
    path.write_bytes(data.replace(b"K\x04\x85", b"K\x05\x85"))
    with pytest.raises(IdmFastError, match="must hold 20 bytes, got 16"):
        load_arrays(path)


@pytest.mark.parametrize("damage", [b"", b"not a pickle", b"\x80\x03}q\x00(X\x05"])
def test_a_damaged_file_is_one_line(tmp_path: Path, damage: bytes) -> None:
    path = tmp_path / "damaged.ckpt"
    path.write_bytes(damage)
    with pytest.raises(IdmFastError, match=r"damaged\.ckpt"):
        load_arrays(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(IdmFastError, match=r"absent\.ckpt: cannot be read"):
        load_arrays(tmp_path / "absent.ckpt")
