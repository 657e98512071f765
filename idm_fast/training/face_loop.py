"""A training run over faces: which of them a process gets in which step, and who reads them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset

from idm_fast.training.data import FacePairs
from idm_fast.training.loop import Config, Loop, Model
from idm_fast.training.settings import FaceSettings

_CACHE_BYTES = 1 << 30  # of decoded pictures, all loading processes together


class FaceLoop(Loop[Config, Model]):
    """A ``Loop`` whose steps each take the next batch of ``self.faces``; what an item is follows from its position."""

    settings: FaceSettings

    @property
    def _items(self) -> int:
        """Of the whole run, all processes together."""
        return self.settings.steps * self.settings.batch_size * self.group.size

    @property
    def _cache_bytes(self) -> int:
        """For each loading process."""
        return _CACHE_BYTES // max(1, self.settings.workers)

    def _batches(self, items: Dataset[Any]) -> DataLoader[Any]:
        """This process's share of ``items`` from this step on, a batch a step."""
        mine = Subset(items, range(self._first() + self.group.rank, self._items, self.group.size))
        pinned = self.device.type == "cuda"
        return DataLoader(mine, self.settings.batch_size, num_workers=self.settings.workers, pin_memory=pinned)

    def _pairs(self, size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """(x0, y) of each step, faces and their degraded twins: both [B, 3, size, size] in [-1, 1] on the device."""
        pairs = FacePairs(self.faces, size, self._items, self.settings.seed, cache_bytes=self._cache_bytes)
        for x0, y in self._batches(pairs):
            yield x0.to(self.device, non_blocking=True), y.to(self.device, non_blocking=True)
