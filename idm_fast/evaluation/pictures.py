"""Sets of pictures on disk: the clean crops, and any other folder that is judged against them."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image
from torch import Tensor

from idm_fast.errors import IdmFastError
from idm_fast.training.data import PICTURES, picture_paths, read_square, to_tensor


@dataclass(frozen=True)
class PictureSet:
    """Pictures to be seen at ``size`` px: first those with a clean twin (``twins``, in their order), then others."""

    name: str
    paths: list[Path]
    twins: list[Path]
    size: int

    def batches(self, count: int) -> Iterator[tuple[int, int, bool]]:
        """(first, last + 1, whether they have twins) of batches of at most ``count`` pictures."""
        middle, end = len(self.twins), len(self.paths)
        for start, stop, paired in ((0, middle, True), (middle, end, False)):
            for first in range(start, stop, count):
                yield first, min(first + count, stop), paired


def load_at(path: Path, size: int) -> Tensor:
    """The square picture as [3, size, size] in [-1, 1]. Raises ``IdmFastError`` where it had to be enlarged."""
    rgb = read_square(path)
    if rgb.width < size:
        raise IdmFastError(f"{path}: must be at least --size = {size} px, got {rgb.width}: judge it at its own size")
    return to_tensor(rgb, size)


def check_headers(paths: Iterable[Path], size: int) -> None:
    """What ``load_at`` would raise of the first file that is no picture, not square or too small, before any work."""
    for path in paths:
        try:
            with Image.open(path) as picture:
                fits = picture.width == picture.height >= size
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
            fits = False
        if not fits:
            load_at(path, size)


def picture_set(folder: Path, clean: Sequence[Path], root: Path, size: int, taken: Sequence[str] = ()) -> PictureSet:
    """The pictures below ``folder``; twins are the ``clean`` files with the same name relative to ``root``.

    Where none has, to the folder that holds all clean files: what was restored from ROOT/val has no "val" in its names.
    The ending does not count: restored files are often PNG where the clean are JPEG. The folder gives the set its name,
    with its parent where the name is ``taken``. Raises ``IdmFastError`` where there is no picture, or two for one twin.
    """
    if not folder.is_dir():
        raise IdmFastError(f"{folder}: must be a folder of pictures, got nothing there")
    files = sorted(picture_paths(folder))
    if not files:
        raise IdmFastError(f"{folder}: must hold pictures ({' '.join(sorted(PICTURES))}), got none")
    names = {path: path.relative_to(folder).with_suffix("") for path in files}
    places = _places(clean, root)
    if clean and not set(places) & set(names.values()):
        places = _places(clean, Path(os.path.commonpath([path.parent for path in clean])))
    pairs: dict[Path, Path] = {}
    alone = []
    for path, place in names.items():
        if place not in places:
            alone.append(path)
        elif place in pairs:
            raise IdmFastError(f"{path}: must be the only picture for {places[place]}, but {pairs[place].name} is too")
        else:
            pairs[place] = path
    name = folder.resolve().name
    if name in taken:
        name = f"{folder.resolve().parent.name}/{name}"
    if name in taken:
        name = str(folder)
    both = [place for place in places if place in pairs]
    return PictureSet(name, [*(pairs[place] for place in both), *alone], [places[place] for place in both], size)


def _places(clean: Sequence[Path], root: Path) -> dict[Path, Path]:
    return {path.relative_to(root).with_suffix(""): path for path in clean}


def fingerprint(paths: Sequence[Path]) -> str:
    """A digest that changes when a file of the list is replaced or written to: names, sizes and times."""
    digest = hashlib.sha256()
    for path in paths:
        try:
            state = path.stat()
        except OSError as error:
            raise IdmFastError(f"{path}: must be a picture, got none: {error.strerror}") from None
        digest.update(f"{path}\0{state.st_size}\0{state.st_mtime_ns}\0".encode(errors="surrogateescape"))
    return digest.hexdigest()
