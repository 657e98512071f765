"""From what a user typed to (input file, output file) pairs."""

from __future__ import annotations

import glob
import os
from dataclasses import dataclass
from pathlib import Path

from idm_fast.errors import IdmFastError
from idm_fast.images import READABLE, WRITABLE


@dataclass(frozen=True)
class Job:
    """One picture to do: read ``source``, write ``target``, and if asked for ``sheet``, before and after."""

    source: Path
    target: Path
    sheet: Path


def collect(inputs: list[str], output: Path, suffix: str = "", extension: str = "auto") -> list[Job]:
    """Files, folders (searched below, their structure kept) and globs as jobs, in order, each once.

    ``output`` is a folder, or a file when there is one input file and ``output`` ends in a picture's extension.
    ``suffix`` goes behind the stem; ``extension`` "auto" keeps the input's (PNG where it cannot be written). In
    folders, names that begin with a dot are passed over: copies from a Mac leave one beside every picture.
    Raises ``IdmFastError`` when nothing matches, when two inputs would be written to one file or one over itself, and
    when nothing can be written to ``output``. A file that is missing or broken is no error here.
    """
    extension = extension.lower().removeprefix(".")
    if extension != "auto" and f".{extension}" not in WRITABLE:
        raise IdmFastError(f"--ext must be auto or one of {_writable()}, got {extension!r}")
    if os.sep in suffix or "\0" in suffix:
        raise IdmFastError(f"--suffix must be a part of a file name, got {suffix!r}")
    found = _find(inputs, output)
    if not os.path.isdir(output):
        kind = output.suffix.lower()
        if kind in WRITABLE and len(found) == 1:
            if suffix or extension != "auto":
                raise IdmFastError(f"--suffix and --ext must be left out where -o names a file, got -o {output}")
            return _checked([(next(iter(found)), output)], output.parent)
        if kind in WRITABLE:
            raise IdmFastError(f"{output}: output must be a folder for {len(found)} inputs, got a file name")
        if kind in READABLE:
            raise IdmFastError(f"{output}: output must be a folder or end in one of {_writable()}, got {kind}")
    return _checked([(source, output / named(place, suffix, extension)) for source, place in found.items()], output)


def named(place: Path, suffix: str, extension: str) -> Path:
    """Output name of an input: its stem, ``suffix``, and the extension."""
    kept = place.suffix if place.suffix.lower() in WRITABLE else ".png"
    return place.with_name(place.stem + suffix + (kept if extension == "auto" else f".{extension}"))


def _find(inputs: list[str], output: Path) -> dict[Path, Path]:
    """Input files, each with its place below the output folder."""
    found: dict[Path, Path] = {}
    for text in inputs:
        path = Path(text)
        # os.path, because a name that is too long or not a name at all is "not there", and not an exception.
        if os.path.isdir(text):
            _add(found, _below(path, output))
        elif os.path.exists(text) or not glob.has_magic(text):
            _add(found, {path: Path(path.name)})
        else:
            matches = [Path(match) for match in sorted(glob.glob(text, recursive=True))]
            files = [match for match in matches if not match.is_dir()]
            if not matches:
                raise IdmFastError(f"{text}: pattern must match a file or folder, got no match")
            _add(found, {match: Path(match.name) for match in files})
            for folder in [] if files else matches:
                _add(found, _below(folder, output))
    return found


def _add(found: dict[Path, Path], more: dict[Path, Path]) -> None:
    """Adds files that are not there yet; the same file by another way to write its path is the same file."""
    known = {(os.path.realpath(path), place) for path, place in found.items()}
    for path, place in more.items():
        if path not in found and (os.path.realpath(path), place) not in known:
            found[path] = place


def _below(folder: Path, output: Path) -> dict[Path, Path]:
    """Pictures in ``folder`` and below; what lies in the output folder is left out, unless that is ``folder``."""
    inside = Path(os.path.realpath(output))
    places = {}
    for root, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        real = Path(os.path.realpath(root))
        if real.is_relative_to(inside) and inside != Path(os.path.realpath(folder)):
            folders.clear()
            continue
        for name in sorted(names):
            if Path(name).suffix.lower() in READABLE and not name.startswith("."):
                path = Path(root) / name
                places[path] = path.relative_to(folder)
    if not places:
        raise IdmFastError(f"{folder}: folder must hold pictures ({' '.join(READABLE)}), got none")
    return places


def _checked(pairs: list[tuple[Path, Path]], folder: Path) -> list[Job]:
    """The pairs as jobs, with a name for each before/after picture that no other file takes."""
    _check_writable(folder)
    taken: dict[Path, Path] = {}
    for source, target in pairs:
        if target in taken:
            raise IdmFastError(
                f"{source}: output {target} must be its own, but {taken[target]} is written there too; "
                "restore them to different folders"
            )
        if os.path.realpath(target) == os.path.realpath(source):
            raise IdmFastError(f"{source}: output must not be the input itself; give another -o or a --suffix")
        taken[target] = source
    jobs = []
    for source, target in pairs:
        stem = target.stem
        if target.with_name(f"{stem}.compare.png") in taken:  # a.jpg and a.png have the same stem
            stem = target.name
        while (sheet := target.with_name(f"{stem}.compare.png")) in taken:
            stem += ".compare"
        taken[sheet] = source
        jobs.append(Job(source, target, sheet))
    return jobs


def _check_writable(folder: Path) -> None:
    """Whether files can appear in ``folder``, which need not exist: better now than after all the work."""
    place = Path(os.path.abspath(folder))
    while not os.path.lexists(place) and place != place.parent:
        place = place.parent
    if not os.path.isdir(place):
        raise IdmFastError(f"{folder}: output must be a folder or a new name, got {place}, which is no folder")
    if not os.access(place, os.W_OK | os.X_OK):
        raise IdmFastError(f"{folder}: output must be a writable folder, got {place}, which is not")


def _writable() -> str:
    return " ".join(name[1:] for name in WRITABLE)
