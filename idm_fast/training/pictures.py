"""A set of pictures in memory, and its batches as a pure function of (seed, position)."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from idm_fast.errors import IdmFastError
from idm_fast.training.data import UnreadableError, list_faces, read_square, to_tensor

_MOST_BYTES = 8 << 30  # 700,000 pictures of 64 x 64


class Pictures:
    """``pixels`` uint8 [N, 3, S, S]: the pictures of ``split`` under ``folder``, each decoded once.

    An unreadable one is named and left out. Raises ``IdmFastError`` where there is none, one is not square, or they
    are more than fit into 8 GiB.
    """

    def __init__(self, folder: Path, split: str, size: int, min_native_px: int = 0) -> None:
        faces = list_faces(folder, split, min_native_px)
        if len(faces) * 3 * size * size > _MOST_BYTES:
            raise IdmFastError(
                f"{folder}: pictures must fit into {_MOST_BYTES >> 30} GiB = {_MOST_BYTES // (3 * size * size)} of "
                f"{size} x {size}, got {len(faces)}"
            )
        found = []
        for face in faces:
            try:
                picture = to_tensor(read_square(face.path), size)
            except UnreadableError as error:
                tqdm.write(f"{error}; left out", file=sys.stderr)
            else:
                found.append(((picture + 1) * 127.5).round().clamp(0, 255).byte())
        if not found:
            raise IdmFastError(f"{folder}: none of the {len(faces)} pictures can be read")
        self.pixels = torch.stack(found)
        self._epoch, self._order, self._flips = (-1, -1), np.empty(0, np.int64), np.empty(0, np.bool_)

    def __len__(self) -> int:
        return len(self.pixels)

    def images(self, index: Tensor | slice) -> Tensor:
        """Pictures ``index`` as float32 [n, 3, S, S] in [-1, 1]."""
        return self.pixels[index].float() / 127.5 - 1

    def batch(self, positions: range, seed: int) -> Tensor:
        """Items ``positions`` of the run ``seed``: every epoch in a new order, each picture mirrored at random.

        float32 [len(positions), 3, S, S] in [-1, 1]. An item depends on the seed and its position alone.
        """
        index, mirrored = [], []
        for position in positions:
            epoch, place = divmod(position, len(self))
            if (seed, epoch) != self._epoch:
                rng = np.random.default_rng((seed, 1, epoch))
                self._epoch = seed, epoch
                self._order, self._flips = rng.permutation(len(self)), rng.random(len(self)) < 0.5
            index.append(int(self._order[place]))
            mirrored.append(bool(self._flips[place]))
        images = self.images(torch.tensor(index))
        return torch.where(torch.tensor(mirrored)[:, None, None, None], images.flip(3), images)
