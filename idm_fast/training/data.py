"""Aligned faces and their degraded twins, as a pure function of (seed, position).

Item number ``i`` of a run depends on nothing but the seed and ``i``: which picture, which crop, which degradation.
A resumed run therefore sees exactly the batches that an uninterrupted one would have seen.
"""

from __future__ import annotations

import csv
import hashlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

from idm_fast.errors import IdmFastError
from idm_fast.images import read_image
from idm_fast.training.degradation import degrade

PICTURES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff"}
_ORIENTATION = 0x0112  # EXIF


@dataclass(frozen=True)
class FaceFile:
    """One aligned crop: its file, and the side in pixels it had in its source picture (0 = unknown)."""

    path: Path
    native_px: int
    source: str


def picture_paths(folder: Path) -> Iterator[Path]:
    """Pictures below ``folder``, in no fixed order; hidden ones, unfinished or of another program, are left out."""
    for path in folder.rglob("*"):
        hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        if path.suffix.lower() in PICTURES and not hidden:
            yield path


def list_faces(folder: Path, split: str, min_native_px: int = 0) -> list[FaceFile]:
    """Aligned crops of ``split`` under ``folder``, from its ``faces.csv`` (without one: every picture, split 'train').

    ``min_native_px`` leaves out crops that were enlarged from fewer pixels, which are soft. Raises ``IdmFastError``
    when the folder is missing or nothing is left.
    """
    table = folder / "faces.csv"
    if table.is_file():
        try:
            with table.open(newline="", encoding="utf-8-sig") as file:
                rows = list(csv.DictReader(file))
        except (OSError, UnicodeDecodeError, csv.Error) as error:
            raise IdmFastError(f"{table}: cannot be read as a table: {error}") from None
        needed = {"file", "split", "native_px"}
        if rows and not needed <= set(rows[0]):
            raise IdmFastError(f"{table}: columns must include {sorted(needed)}, got {sorted(map(str, rows[0]))}")
        try:
            faces = [
                FaceFile(folder / row["file"], int(row["native_px"]), row.get("source", ""))
                for row in rows
                if row["split"] == split and int(row["native_px"]) >= min_native_px
            ]
        except (TypeError, ValueError) as error:  # a short row, or one that is not a number
            raise IdmFastError(f"{table}: native_px must be a whole number in every row: {error}") from None
    elif folder.is_dir():
        files = sorted(picture_paths(folder))
        faces = [FaceFile(path, 0, "") for path in files] if split == "train" else []
    else:
        raise IdmFastError(f"{folder}: must be a folder of aligned faces or photographs, got nothing there")
    if not faces:
        raise IdmFastError(f"{folder}: no face of split {split!r} with native_px >= {min_native_px}")
    return faces


def fingerprint(faces: list[FaceFile], folder: Path) -> dict[str, str]:
    """What a run that goes on compares: "faces", their number and a checksum of their names under ``folder`` and native
    sizes, and "bytes", all their lengths together and a checksum of them.

    Nothing is opened, and a copy of the folder is the same as the folder; a picture that was written anew nearly always
    has another length.
    """
    names = "\n".join(f"{_place(face.path, folder).as_posix()},{face.native_px}" for face in faces)
    lengths = [_length(face.path) for face in faces]
    return {
        "faces": f"{len(faces)}, {_checksum(names)}",
        "bytes": f"{sum(lengths)}, {_checksum(','.join(map(str, lengths)))}",
    }


def _place(path: Path, folder: Path) -> Path:
    """``path`` below ``folder``; one that a table names from the root lies elsewhere."""
    return path.relative_to(folder) if path.is_relative_to(folder) else path


def _checksum(text: str) -> str:
    return hashlib.sha256(text.encode(errors="surrogateescape")).hexdigest()[:12]  # a name on disk need not be text


def _length(path: Path) -> int:
    """0 where the file cannot be asked: training will name it."""
    try:
        return path.stat().st_size
    except OSError:
        return 0


def load_crop(path: Path, size: int) -> Tensor:
    """The picture as [3, size, size] in [-1, 1], shrunk or enlarged with anti-aliasing."""
    return to_tensor(read_square(path), size)


class UnreadableError(IdmFastError):
    """A file that is no whole picture."""


def read_square(path: Path) -> Image.Image:
    """The aligned crop in ``path``, upright, as RGB of 8 bits.

    Raises ``UnreadableError``, or ``IdmFastError`` where it is not square.
    """
    try:
        with Image.open(path) as picture:
            # Pillow would clip the 16 bits of a grey picture to white, and leave a turned one lying.
            plain = picture.mode[0] not in "IF" and picture.getexif().get(_ORIENTATION, 1) == 1
            rgb = picture.convert("RGB") if plain else _read_carefully(path)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise UnreadableError(f"{path}: cannot be read as a picture: {error}") from None
    if rgb.width != rgb.height:
        raise IdmFastError(
            f"{path}: must be an aligned crop = square, got {rgb.width} x {rgb.height}; "
            "of photographs the faces must be cut out first (idm-fast train --align)"
        )
    return rgb


def _read_carefully(path: Path) -> Image.Image:
    try:
        pixels = read_image(path).pixels
    except IdmFastError as error:
        raise UnreadableError(str(error)) from None
    return Image.fromarray((pixels * 255 + 0.5).astype(np.uint8))


def to_tensor(rgb: Image.Image, size: int) -> Tensor:
    """A square RGB picture as [3, size, size] in [-1, 1], resized by Lanczos where it must be."""
    if rgb.size != (size, size):
        rgb = rgb.resize((size, size), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.asarray(rgb, dtype=np.float32) / 127.5 - 1).permute(2, 0, 1).contiguous()


class Faces:
    """x0 [3, size, size] in [-1, 1] for positions ``0 .. length - 1`` of a run.

    Pictures come in a new random order every epoch; each is flipped half of the time and shifted, turned and
    zoomed a little (``jitter``, a fraction of the side), since a detector never frames a face twice alike. An
    unreadable file is named once and the next one takes its place. Decoded pictures are kept up to ``cache_bytes``.
    """

    def __init__(
        self,
        faces: list[FaceFile],
        size: int,
        length: int,
        seed: int,
        jitter: float = 0.04,
        cache_bytes: int = 1 << 30,
    ) -> None:
        self.faces, self.size, self.length, self.seed, self.jitter = faces, size, length, seed, jitter
        self._cache: dict[int, Image.Image] = {}
        self._free = cache_bytes
        self._broken: set[int] = set()
        self._epoch, self._order = -1, np.empty(0, dtype=np.int64)

    def __len__(self) -> int:
        return self.length

    def _picture(self, index: int) -> Image.Image:
        if index in self._cache:
            return self._cache[index]
        picture = read_square(self.faces[index].path)
        bytes_used = 3 * picture.width * picture.height
        if bytes_used <= self._free:
            self._free -= bytes_used
            self._cache[index] = picture
        return picture

    def _readable(self, place: int) -> Image.Image:
        """The picture at ``place`` of this epoch's order, or the next one after it that can be read."""
        for index in (int(self._order[(place + i) % len(self._order)]) for i in range(len(self._order))):
            if index not in self._broken:
                try:
                    return self._picture(index)
                except UnreadableError as error:
                    self._broken.add(index)
                    tqdm.write(f"{error}; left out", file=sys.stderr)
        raise IdmFastError(f"{self.faces[0].path.parent}: none of the {len(self.faces)} pictures can be read")

    def face(self, position: int) -> tuple[Tensor, np.random.Generator]:
        """x0, and what is random of this position from here on."""
        epoch, place = divmod(position, len(self.faces))
        if epoch != self._epoch:
            self._epoch = epoch
            self._order = np.random.default_rng((self.seed, 1, epoch)).permutation(len(self.faces))
        rng = np.random.default_rng((self.seed, 2, position))
        return self._crop(self._readable(place), rng), rng

    def _crop(self, picture: Image.Image, rng: np.random.Generator) -> Tensor:
        """Jittered crop. Turning and zooming happen at the source's size, before it shrinks, so nothing goes soft;
        a source no larger than the crop is only flipped and shifted by whole pixels."""
        side = picture.width
        pixels = np.asarray(picture)
        if rng.random() < 0.5:
            pixels = pixels[:, ::-1]
        margin = side // 8
        shift = np.rint(side * self.jitter * rng.uniform(-1, 1, 2)).astype(int)
        zoom = 1 + self.jitter * rng.uniform(-1, 1)
        angle = np.deg2rad(100 * self.jitter * rng.uniform(-1, 1))
        padded = np.pad(pixels, ((margin, margin), (margin, margin), (0, 0)), mode="reflect")
        if side >= 1.5 * self.size:
            c, s, half = np.cos(angle) / zoom, np.sin(angle) / zoom, side / 2
            x, y = half + margin + shift[0], half + margin + shift[1]
            matrix = (c, -s, x - (c - s) * half, s, c, y - (s + c) * half)
            turned = Image.fromarray(padded).transform(
                (side, side), Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR
            )
            return to_tensor(turned, self.size)
        left, top = margin + shift
        return to_tensor(Image.fromarray(padded[top : top + side, left : left + side]), self.size)


class FacePairs(Faces, Dataset[tuple[Tensor, Tensor]]):
    """(x0, y): a face and its degraded twin, both [3, size, size] in [-1, 1]."""

    def __getitem__(self, position: int) -> tuple[Tensor, Tensor]:
        x0, rng = self.face(position)
        return x0, degrade(x0, rng)


class FacePictures(Faces, Dataset[Tensor]):
    """Faces [3, size, size] in [-1, 1], of which the share ``degraded`` is degraded."""

    def __init__(
        self, faces: list[FaceFile], size: int, length: int, seed: int, degraded: float, cache_bytes: int
    ) -> None:
        super().__init__(faces, size, length, seed, cache_bytes=cache_bytes)
        self.degraded = degraded

    def __getitem__(self, position: int) -> Tensor:
        x0, rng = self.face(position)
        return degrade(x0, rng) if rng.random() < self.degraded else x0
