"""The output folder of the cleaner: where it may lie, what it remembers of its settings, and that one run has it.

OUT/.../*.png       the enhanced pictures, under the names of the originals
OUT/faces.csv       the source's, with what became of each, where the source has one
OUT/clean.jsonl     the manifest
OUT/clean.json      the settings
OUT/.clean/         the lock, and pictures not yet whole
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from idm_fast.clean.manifest import DiskError
from idm_fast.errors import IdmFastError
from idm_fast.files import atomic, clear_unfinished
from idm_fast.registry import find_files

MANIFEST, SETTINGS, FACES_CSV = "clean.jsonl", "clean.json", "faces.csv"
_OWN = ".clean"  # what else begins so is unfinished settings, which a kill left


def parts_folder(out: Path) -> Path:
    return out / _OWN / "parts"


def check_apart(source: Path, out: Path) -> None:
    """Raises ``IdmFastError`` unless ``source`` is a folder and neither of the two holds the other, links followed."""
    if not source.is_dir():
        got = "a file" if source.exists() else "nothing there"
        raise IdmFastError(f"{source}: source must be a folder of pictures, got {got}")
    inside, outside = Path(os.path.realpath(source)), Path(os.path.realpath(out))
    if inside == outside:
        raise IdmFastError(f"{out}: output must be another folder than the source {source}, got the same")
    if outside.is_relative_to(inside) or inside.is_relative_to(outside):
        holder, held = (source, out) if outside.is_relative_to(inside) else (out, source)
        raise IdmFastError(f"{out}: output and source must lie apart, got {held} inside {holder}")
    if out.exists() and not out.is_dir():
        raise IdmFastError(f"{out}: output must be a folder or a new name, got a file")


def check_places(out: Path, outputs: Iterable[str]) -> None:
    """Raises ``IdmFastError`` where a folder below ``out`` is a link to elsewhere, perhaps into the source."""
    real = os.path.realpath(out)
    for parent in {os.path.dirname(output) for output in outputs}:
        actual = os.path.realpath(out / parent)
        if actual != os.path.normpath(os.path.join(real, parent)):
            raise IdmFastError(f"{out / parent}: must be a folder of the output, got a link to {actual}")


@contextmanager
def opened(out: Path, settings: dict[str, Any]) -> Iterator[None]:
    """Makes or takes up ``out`` for a run with these settings, alone; unfinished files of earlier runs go.

    Raises ``IdmFastError`` for a folder that holds something else, that was made with other settings (naming each
    difference), or that another run is working in.
    """
    own = out / _OWN
    existing = out / SETTINGS
    try:
        if out.is_dir() and not existing.exists() and any(not path.name.startswith(_OWN) for path in out.iterdir()):
            raise IdmFastError(f"{out}: output must be new, empty or of an earlier run, got a folder with other files")
        own.mkdir(parents=True, exist_ok=True)
        lock = (own / "lock").open("w")
    except OSError as error:
        raise DiskError(f"{out}: output must be a writable folder, got {error.strerror or error}") from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise IdmFastError(
                f"{out}: output must be this run's alone, got another run that is working there"
            ) from None
        if existing.exists():
            _compare(existing, settings)
        else:
            try:
                with atomic(existing) as temporary:
                    temporary.write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")
            except IdmFastError as error:
                raise DiskError(str(error)) from None
        for name in (SETTINGS, MANIFEST, FACES_CSV):
            clear_unfinished(out / name)
        try:
            shutil.rmtree(parts_folder(out), ignore_errors=True)
            parts_folder(out).mkdir(exist_ok=True)
        except OSError as error:
            raise DiskError(f"{parts_folder(out)}: must be writable, got {error.strerror or error}") from None
        try:
            yield
        finally:  # of a worker that was killed in this run; what cannot go now goes with the next
            with suppress(OSError):
                for part in parts_folder(out).glob("*"):
                    part.unlink(missing_ok=True)


def model_files(model: str | Path) -> dict[str, str]:
    """SHA-256 of each weights file of a model, by its name. Raises ``IdmFastError`` for one that cannot be read."""
    found = {}
    for path in find_files(model):
        try:
            with path.open("rb") as file:
                found[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise IdmFastError(f"{path}: model must be readable, got {error.strerror or error}") from None
    return found


def _compare(path: Path, settings: dict[str, Any]) -> None:
    try:
        before = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise IdmFastError(f"{path}: settings must be readable JSON, got: {error}") from None
    if not isinstance(before, dict):
        raise IdmFastError(f"{path}: settings must be a table, got {type(before).__name__}")
    before, after = _flat(before), _flat(json.loads(json.dumps(settings)))
    different = [name for name in {**before, **after} if before.get(name) != after.get(name)]
    if different:
        said = "; ".join(f"{name} was {before.get(name)}, is {after.get(name)}" for name in different)
        raise IdmFastError(f"{path.parent}: output must be gone on with under its own settings, got others: {said}")


def _flat(settings: dict[str, Any]) -> dict[str, Any]:
    """One level: the options and files by name."""
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        if isinstance(value, dict):
            flat |= {f"{name}.{key}": inner for key, inner in value.items()}
        else:
            flat[name] = value
    return flat
