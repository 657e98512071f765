"""What there is to do: the pictures of a folder, what each will be called, and which of them are the same bytes."""

from __future__ import annotations

import csv
import hashlib
import os
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any

from idm_fast.clean.folder import FACES_CSV
from idm_fast.errors import IdmFastError
from idm_fast.faces.dataset import picture_files
from idm_fast.images import READABLE, WRITABLE, image_size

_LOOKED_AT = 64  # pictures whose sizes tell aligned crops from photographs
_TAIL = 4096  # bytes that tell most files of one length apart
_NEEDED = ("file", "split")


@dataclass(frozen=True)
class Task:
    """One picture: its place ``name`` below the source, the place ``output`` of a restored one below the output folder,
    whether to ``restore`` it (else it is copied), its length in bytes (-1: cannot be asked) and when it was last
    written (``mtime_ns``), and the picture whose bytes it repeats, which is done in its stead."""

    name: str
    output: str
    restore: bool = True
    length: int = 0
    mtime_ns: int = 0
    duplicate_of: str | None = None

    @property
    def asked(self) -> str:
        """What is to be done with it: a later run with another answer does it again."""
        return "restore" if self.restore else "copy"


@dataclass(frozen=True)
class Listing:
    """All pictures of a source, whether they are ``aligned`` crops and ``why`` they are taken as that or as
    photographs; ``columns`` and ``rows`` of its ``faces.csv`` (none without one)."""

    tasks: list[Task]
    aligned: bool
    why: str
    columns: list[str] = field(default_factory=list)
    rows: list[dict[str, str]] = field(default_factory=list)

    @property
    def taken_as(self) -> str:
        return f"taken as {'aligned crops' if self.aligned else 'photographs'}, {self.why}"


def list_pictures(source: Path, aligned: bool | None, ext: str | None, limit: int | None = None) -> Listing:
    """The pictures of ``source`` in order: the rows of its ``faces.csv``, or every picture below it, hidden ones left
    out. Rows of another split than 'train' are to be copied: what is judged with must not be made by the restorer.

    Raises ``IdmFastError`` for a folder without pictures, a table that cannot be read, and two pictures that would be
    written to one file.
    """
    table = source / FACES_CSV
    columns: list[str] = []
    rows: list[dict[str, str]] = []
    if table.is_file() and aligned is not False:
        columns, rows = _read_table(table)
        splits = {row["file"]: row["split"] for row in rows}
        aligned, why = True, f"since it has a {FACES_CSV}"
    else:
        splits = {path.relative_to(source).as_posix(): "train" for path in picture_files(source)}
        why = "as asked"
        if aligned is None:
            aligned, why = _looks_aligned(source, list(splits))
    if not splits:
        raise IdmFastError(f"{source}: folder must hold pictures ({' '.join(READABLE)}), got none")
    ext = ext or ("png" if aligned else "auto")
    names = list(splits)[:limit]
    outputs = _outputs(source, names, ext)
    tasks = [
        Task(name, outputs[name] if splits[name] == "train" else name, splits[name] == "train", *_state(source / name))
        for name in names
    ]
    return Listing(tasks, aligned, why, columns, rows)


def with_duplicates(source: Path, tasks: list[Task]) -> list[Task]:
    """The tasks, each that repeats the bytes of an earlier one with that one's name.

    Only files of one length are opened, and only those with one ending are read whole.
    """
    first: dict[str, str] = {}
    by_length = _groups(tasks, _likeness)
    by_tail = (group for like in by_length for group in _groups(like, lambda task: _digest(source / task.name, _TAIL)))
    for group in by_tail:
        for same in _groups(group, lambda task: _digest(source / task.name)):
            first |= {task.name: same[0].name for task in same[1:]}
    return [replace(task, duplicate_of=first.get(task.name)) for task in tasks]


def _groups(tasks: Iterable[Task], key: Any) -> list[list[Task]]:
    """Tasks of one key, in order; those alone with theirs, or with None, left out."""
    groups: dict[Any, list[Task]] = defaultdict(list)
    for task in tasks:
        if (value := key(task)) is not None:
            groups[value].append(task)
    return [group for group in groups.values() if len(group) > 1]


def _likeness(task: Task) -> Any:
    """Two of one likeness would be treated alike, and may have the same bytes."""
    return (task.restore, PurePosixPath(task.name).suffix.lower(), task.length) if task.length > 0 else None


def _digest(path: Path, tail: int | None = None) -> bytes | None:
    """Hash of a file, or of its last bytes; None where it cannot be read (the worker will say why)."""
    try:
        with path.open("rb") as file:
            if tail is None:
                return hashlib.file_digest(file, "blake2b").digest()
            file.seek(-min(tail, os.fstat(file.fileno()).st_size), os.SEEK_END)
            return file.read()
    except OSError:
        return None


def content_digest(data: bytes) -> str:
    """Of a picture's file, as the manifest keeps it: enough to tell whether it changed."""
    return hashlib.blake2b(data, digest_size=8).hexdigest()


def _state(path: Path) -> tuple[int, int]:
    """(bytes, time of the last change in ns) of a file; (-1, 0) where it cannot be asked."""
    try:
        state = path.stat()
    except OSError:
        return -1, 0
    return state.st_size, state.st_mtime_ns


def _read_table(table: Path) -> tuple[list[str], list[dict[str, str]]]:
    try:
        with table.open(newline="", encoding="utf-8-sig", errors="surrogateescape") as file:
            reader = csv.DictReader(file)
            rows = list(reader)
            columns = list(reader.fieldnames or ())
    except (OSError, csv.Error) as error:
        raise IdmFastError(f"{table}: must be readable as a table, got: {error}") from None
    if missing := [name for name in _NEEDED if name not in columns]:
        raise IdmFastError(f"{table}: columns must include {', '.join(_NEEDED)}, got no {missing[0]}")
    for number, row in enumerate(rows, 2):
        name = row["file"] or ""
        place = PurePosixPath(name)
        if not name or place.is_absolute() or ".." in place.parts or row["split"] is None:
            raise IdmFastError(
                f"{table}:{number}: row must name a file below its folder and a split, got {name!r}, {row['split']!r}"
            )
    return columns, rows


def _looks_aligned(source: Path, names: list[str]) -> tuple[bool, str]:
    """Whether pictures are aligned crops, by the sizes of some of them, and the reason in words."""
    sizes = set()
    for name in names[:: max(1, len(names) // _LOOKED_AT)]:
        try:
            sizes.add(image_size(source / name))
        except IdmFastError:  # it will be named when it is its turn
            continue
    if len(sizes) == 1:
        ((width, height),) = sizes
        if width == height:
            return True, f"since its pictures are all {width} x {height}"
    return False, "since its pictures are not squares of one size"


def _outputs(source: Path, names: list[str], ext: str) -> dict[str, str]:
    """Where each picture's restored one goes: its own place with the extension ``ext``; where two share a stem, the
    one that changes its extension gets it behind its whole name."""
    wanted = {name: _named(name, ext) for name in names}
    shared = defaultdict(list)
    for name, output in wanted.items():
        shared[output].append(name)
    for output, group in shared.items():
        if len(group) > 1:
            wanted |= {name: name + PurePosixPath(output).suffix for name in group if name != output}
    taken: dict[str, str] = {name: name for name in names}  # a rejected picture is copied to its own place
    for name, output in wanted.items():
        if taken.setdefault(output, name) != name:
            raise IdmFastError(
                f"{source}: each picture must have an output of its own, but {taken[output]} and {name} would both be "
                f"written to {output}; rename one"
            )
    return wanted


def _named(name: str, ext: str) -> str:
    place = PurePosixPath(name)
    kept = place.suffix if place.suffix.lower() in WRITABLE else ".png"
    return str(place.with_suffix(kept if ext == "auto" else f".{ext}"))
