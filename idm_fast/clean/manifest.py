"""The manifest ``clean.jsonl``: one line a picture, written when its file is whole and in place.

Each line is a JSON record that ends with a checksum of itself, so that a line which a kill or a full disk tore, and one
that was edited, are both known for what they are. Lines reach the operating system one by one, so a killed process
loses none; they are forced to the disk once a second, so a power cut loses at most the last second's, whose pictures
are then done again. (A picture that the power cut emptied is found by its size.)
"""

from __future__ import annotations

import json
import os
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from idm_fast.errors import IdmFastError
from idm_fast.files import atomic

Record = dict[str, Any]
RESULTS = ("kept", "blended", "rejected", "copied", "duplicate", "failed")
_SYNC_SECONDS = 1.0


class DiskError(IdmFastError):
    """The output cannot be written (a full disk, say): no picture's fault, so the run ends and can go on later."""


def encode(record: Record) -> bytes:
    """The record's line: compact JSON with its checksum as the last key."""
    text = json.dumps(record, separators=(",", ":"))
    return f'{text[:-1]},"crc":"{zlib.crc32(text.encode()):08x}"}}\n'.encode()


def decode(line: bytes) -> Record:
    """The record of a line; raises ``ValueError`` with what is wrong with it."""
    record = json.loads(line)
    if not isinstance(record, dict):
        raise ValueError("no record")
    crc = record.pop("crc", None)
    actual = f"{zlib.crc32(json.dumps(record, separators=(',', ':')).encode()):08x}"
    if crc != actual:
        raise ValueError(f"its content has checksum {actual}, and its crc says {crc}")
    if not isinstance(record.get("file"), str) or record.get("result") not in RESULTS:
        raise ValueError(f"file must be a name and result one of {', '.join(RESULTS)}")
    return record


def scan(path: Path) -> Iterator[Record]:
    """Records in the order they were written, one at a time; none where there is no manifest yet.

    A last line without its end is a torn one and is cut off: its picture will be done again. Any other line that is not
    as it was written raises ``IdmFastError`` with file and line, since what it said of its picture is lost.
    """
    lines: dict[str, int] = {}
    try:
        file = path.open("rb")
    except FileNotFoundError:
        return
    except OSError as error:
        raise IdmFastError(f"{path}: manifest must be readable, got {error.strerror or error}") from None
    with file:
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n"):
                _cut(path, file.tell() - len(line))
                return
            try:
                record = decode(line)
            except ValueError as error:
                raise IdmFastError(
                    f"{path}:{number}: line must be as it was written, got a changed one ({_short(error)}); "
                    "delete the line, and its picture is done again"
                ) from None
            name = record["file"]
            if name in lines:
                raise IdmFastError(
                    f"{path}:{number}: each picture must have one line, but {name} has line {lines[name]} too; "
                    "delete both, and it is done again"
                )
            lines[name] = number
            yield record


def rewrite(path: Path, without: set[str]) -> None:
    """Takes the records of some pictures out of the manifest, all at once."""
    try:
        with atomic(path) as temporary, temporary.open("wb") as file:
            file.writelines(encode(record) for record in scan(path) if record["file"] not in without)
            file.flush()
            os.fsync(file.fileno())
    except IdmFastError as error:
        raise DiskError(str(error)) from None


def _cut(path: Path, length: int) -> None:
    try:
        os.truncate(path, length)
    except OSError as error:
        raise DiskError(f"{path}: its torn last line cannot be cut off: {error.strerror or error}") from None


class Writer:
    """Appends records; a line that cannot be written whole is taken back."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._file = path.open("ab", buffering=0)
        except OSError as error:
            raise DiskError(f"{path}: manifest must be writable, got {error.strerror or error}") from None
        self._synced = time.monotonic()

    def append(self, record: Record) -> None:
        """Raises ``DiskError`` where the disk is full."""
        line = encode(record)
        end = self._file.seek(0, os.SEEK_END)
        try:
            written = self._file.write(line)
            if written != len(line):  # the disk took what it had room for
                raise OSError(None, f"only {written} of {len(line)} bytes fit")
            if time.monotonic() - self._synced > _SYNC_SECONDS:
                self.sync()
        except OSError as error:
            self._file.truncate(end)
            raise DiskError(f"{self.path}: cannot be written: {error.strerror or error}") from None

    def sync(self) -> None:
        os.fsync(self._file.fileno())
        self._synced = time.monotonic()

    def close(self) -> None:
        try:
            self.sync()
        except OSError as error:
            raise DiskError(f"{self.path}: cannot be written: {error.strerror or error}") from None
        finally:
            self._file.close()

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def _short(error: ValueError) -> str:
    return str(error)[:120]
