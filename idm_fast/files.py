"""Files that are either whole or absent."""

from __future__ import annotations

import glob
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from idm_fast.errors import IdmFastError

_TOKEN = 8  # characters that tell one writer's temporary file from another's


@contextmanager
def atomic(path: Path, *, make_folder: bool = True) -> Iterator[Path]:
    """A temporary path beside ``path`` to write to; it takes the place of ``path`` when the block ends well.

    On any error the temporary file is removed and ``path`` is left as it was. A file that is replaced keeps its
    permissions. ``make_folder``: a missing folder is made, else it is an error. Raises ``IdmFastError`` where the
    place cannot be written.
    """
    temporary: Path | None = None
    try:
        if path.is_dir():
            raise IsADirectoryError(None, "Is a directory")
        if make_folder:
            path.parent.mkdir(parents=True, exist_ok=True)
        # In the same folder, because a rename is atomic only within one file system.
        # Named before it is made: a signal between the two finds nothing, or what it removes.
        temporary = path.with_name(f".{path.stem[:40]}.{secrets.token_hex(_TOKEN // 2)}{path.suffix}")
        os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
        yield temporary
        temporary.chmod(_mode(path))
        os.replace(temporary, path)
    except OSError as error:
        raise IdmFastError(f"{path}: cannot be written: {error.strerror or error or type(error).__name__}") from None
    finally:
        if temporary is not None:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)


def clear_unfinished(path: Path) -> None:
    """Removes what killed writers of ``path`` left beside it; to be called where no other can be writing there."""
    for left in path.parent.glob(f".{glob.escape(path.stem[:40])}.{'?' * _TOKEN}{glob.escape(path.suffix)}"):
        with suppress(OSError):
            left.unlink()


@contextmanager
def atomic_file(path: Path) -> Iterator[IO[bytes]]:
    """``atomic`` as an open binary file, in a folder that must exist."""
    with atomic(path, make_folder=False) as temporary, temporary.open("wb") as file:
        yield file


def _mode(path: Path) -> int:
    """Permissions of the file that is replaced, else what ``open`` would give; the temporary one is its owner's."""
    try:
        return path.stat().st_mode & 0o777
    except OSError:
        mask = os.umask(0)
        os.umask(mask)
        return 0o666 & ~mask
