"""Cuts a folder of photographs into aligned face crops for training, once, and remembers what was done.

Output layout: ``train/`` and ``val/`` with the crops, ``faces.csv`` (one row a crop), ``done.csv`` (one row a
photograph, with its faces or the reason it was skipped). A second run goes on where the first one stopped.
"""

from __future__ import annotations

import csv
import hashlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np
import torch

from idm_fast.errors import IdmFastError
from idm_fast.faces.align import AlignedFace, crop_face
from idm_fast.faces.detect import shared_detector
from idm_fast.faces.pipeline import Detector, find_faces
from idm_fast.images import READABLE, Picture, read_image, write_image

_POINTS = ("leye", "reye", "nose", "lmouth", "rmouth")
FACE_COLUMNS = ("file", "split", "source", "native_px", "identity", *(f"{p}_{axis}" for p in _POINTS for axis in "xy"))
DONE_COLUMNS = ("source", "bytes", "faces", "reason")
UNKNOWN_IDENTITY = -1


@dataclass
class AlignReport:
    """What one run did: photographs seen in this run, crops written, photographs skipped, already done before."""

    photographs: int = 0
    crops: int = 0
    skipped: int = 0
    resumed: int = 0


def align_folder(
    src: str | Path,
    dst: str | Path,
    size: int = 256,
    *,
    min_native_px: int = 64,
    min_score: float = 0.6,
    val_percent: int = 2,
    detector: Detector | None = None,
    progress: Callable[[int, int, AlignReport], None] | None = None,
) -> AlignReport:
    """Writes the aligned faces of every photograph under ``src`` to ``dst`` as JPEG crops of ``size`` pixels.

    ``min_native_px``: crops that were smaller in the photograph are left out; ``min_score``: so are doubtful faces.
    ``val_percent`` of the photographs, chosen by a hash of their path and so the same in every run, form the ``val``
    split. ``progress(done, total, report)`` is called after each photograph. A photograph that cannot be read is
    recorded in ``done.csv`` and skipped. ``identity`` is -1: unknown.
    Raises ``IdmFastError`` when ``src`` is no folder or ``dst`` is not writable.
    """
    src, dst = Path(src), Path(dst)
    if not src.is_dir():
        raise IdmFastError(
            f"{src}: expected a folder of photographs, got {'a file' if src.exists() else 'no such folder'}"
        )
    # Made before the loop: a missing detector is an error of the run, not of each photograph.
    detector = detector or shared_detector()
    photographs = [path for path in picture_files(src) if not path.is_relative_to(dst)]
    lengths = {path.relative_to(src).as_posix(): _length(path) for path in photographs}
    report = AlignReport()
    try:
        for split in ("train", "val"):
            (dst / split).mkdir(parents=True, exist_ok=True)
        finished = _resume(dst, lengths)
        with _open(dst / "faces.csv", "a") as rows, _open(dst / "done.csv", "a") as done:
            for index, (path, (source, length)) in enumerate(zip(photographs, lengths.items(), strict=True)):
                if source in finished:
                    report.resumed += 1
                else:
                    found, reason = _read_faces(path, detector)
                    faces = [f for f in found.faces if f.native_px >= min_native_px and f.face.score >= min_score]
                    crops = list(_write_crops(found.picture, faces, source, dst, size, val_percent))
                    report.photographs += 1
                    report.crops += len(crops)
                    report.skipped += reason != ""
                    # This order makes a photograph either wholly recorded or done again after a crash.
                    csv.writer(rows).writerows(crops)
                    rows.flush()
                    csv.writer(done).writerow((source, length, len(crops), reason))
                    done.flush()
                if progress is not None:
                    progress(index + 1, len(photographs), report)
    except OSError as error:
        raise IdmFastError(f"{dst}: expected a writable folder, got {error.strerror or error}") from error
    return report


@dataclass(frozen=True)
class _Found:
    picture: Picture
    faces: list[AlignedFace]


def _read_faces(path: Path, detector: Detector) -> tuple[_Found, str]:
    """A photograph and its usable faces; nothing and the reason when it cannot be read."""
    try:
        picture = read_image(path)
    except IdmFastError as error:
        return _Found(Picture(np.zeros((1, 1, 3), dtype=np.float32)), []), str(error)
    return _Found(picture, [face for face in find_faces(picture, detector) if face.method != "box"]), ""


def _open(path: Path, mode: str) -> IO[str]:
    """A CSV file; names of files that are not UTF-8 survive the round trip."""
    return path.open(mode, newline="", encoding="utf-8", errors="surrogateescape")


def picture_files(folder: Path) -> Iterator[Path]:
    """Readable picture files under ``folder``, in a fixed order, hidden ones left out."""
    for root, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            if not name.startswith(".") and Path(name).suffix.lower() in READABLE:
                yield Path(root) / name


def _write_crops(
    picture: Picture, faces: list[AlignedFace], source: str, dst: Path, size: int, val_percent: int
) -> Iterator[list[str]]:
    """Writes each face's crop and yields its row of ``faces.csv``."""
    digest = hashlib.sha256(source.encode()).hexdigest()
    split = "val" if int(digest[:8], 16) % 100 < val_percent else "train"
    for number, face in enumerate(faces):
        crop = crop_face(picture.pixels, face, size)
        name = f"{split}/{digest[:12]}_{number:02d}.jpg"
        write_image(Picture(_to_pixels(crop)), dst / name)
        points = [f"{value:.1f}" for value in face.landmarks(size).ravel()]
        yield [name, split, source, str(round(face.native_px)), str(UNKNOWN_IDENTITY), *points]


def _to_pixels(crop: torch.Tensor) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    pixels: np.ndarray[tuple[int, ...], np.dtype[np.float32]] = ((crop + 1.0) * 0.5).permute(1, 2, 0).numpy()
    return pixels


def _length(path: Path) -> int:
    """Bytes of a file; -1 of one that cannot be asked, such as a broken link: reading it will say why."""
    try:
        return path.stat().st_size
    except OSError:
        return -1


def _resume(dst: Path, lengths: dict[str, int]) -> set[str]:
    """Photographs that an earlier run finished; rows of an unfinished or since changed one are taken out of the lists.

    ``lengths``: bytes of each photograph that is there now. One that is gone keeps its crops.
    """
    done_path, faces_path = dst / "done.csv", dst / "faces.csv"
    finished: dict[str, dict[str, str]] = {}
    if done_path.exists():
        with _open(done_path, "r") as file:
            rows = [row for row in csv.DictReader(file) if row.get("reason") is not None]
        finished = {row["source"]: row for row in rows if row["bytes"] == str(lengths.get(row["source"], row["bytes"]))}
    kept: list[dict[str, str]] = []
    if faces_path.exists():
        with _open(faces_path, "r") as file:
            kept = [row for row in csv.DictReader(file) if row.get("source") in finished and None not in row.values()]
    # The faces last: after a crash between the two, rows without their photograph's entry are taken out again.
    _rewrite(done_path, DONE_COLUMNS, list(finished.values()))
    _rewrite(faces_path, FACE_COLUMNS, kept)
    return set(finished)


def _rewrite(path: Path, columns: tuple[str, ...], rows: list[dict[str, str]]) -> None:
    part = path.with_suffix(".part")
    with _open(part, "w") as file:
        writer = csv.DictWriter(file, columns, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
    os.replace(part, path)
