"""Files that are either whole or absent."""

from __future__ import annotations

import fcntl
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
    held = -1
    try:
        if path.is_dir():
            raise IsADirectoryError(None, "Is a directory")
        if make_folder:
            path.parent.mkdir(parents=True, exist_ok=True)
        # In the same folder, because a rename is atomic only within one file system.
        # Named before it is made: a signal between the two finds nothing, or what it removes.
        temporary = path.with_name(f".{path.stem[:40]}.{secrets.token_hex(_TOKEN // 2)}{path.suffix}")
        held = os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
        with suppress(OSError):  # on a file system without locks
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)  # a kill gives it up: see ``clear_unfinished``
        yield temporary
        temporary.chmod(_mode(path))
        os.replace(temporary, path)
    except OSError as error:
        raise IdmFastError(f"{path}: cannot be written: {error.strerror or error or type(error).__name__}") from None
    finally:
        if temporary is not None:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
        if held >= 0:
            os.close(held)


def clear_unfinished(path: Path) -> None:
    """Removes what killed writers of ``path`` left beside it; the file of one that is still writing stays."""
    names = f".{glob.escape(path.stem[:40])}.{'[0-9a-f]' * _TOKEN}{glob.escape(path.suffix)}"
    for left in path.parent.glob(names):
        with suppress(OSError), left.open("rb+") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # fails where a writer holds it
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
