"""The first bytes of a safetensors file, looked at before anything is allocated."""

from __future__ import annotations

from pathlib import Path

from idm_fast.errors import IdmFastError

LARGEST_HEADER = 8 << 20  # bytes; the header of a network of a thousand tensors has about 100,000


def check_container(path: Path) -> None:
    """A file, and one whose first eight bytes (the length of its JSON header) are believable."""
    try:
        if not path.is_file():
            got = "a folder" if path.is_dir() else "nothing there"
            raise IdmFastError(f"{path}: must be a weights file (.safetensors), got {got}")
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(8)
    except OSError as error:
        raise IdmFastError(f"{path}: cannot be read: {error.strerror}") from None
    if not is_believable(path, start):
        raise IdmFastError(
            f"{path}: must be a safetensors file with a header of 2..{LARGEST_HEADER} bytes inside it, "
            f"got {size} bytes that begin with {start[:8]!r}"
        )


def is_believable(path: Path, start: bytes) -> bool:
    """Whether the first eight bytes can be the length of a header that lies in the file."""
    return len(start) == 8 and 2 <= int.from_bytes(start, "little") <= min(path.stat().st_size - 8, LARGEST_HEADER)
