"""The cleaner's loop: pictures are read ahead, their faces fill the network's batches, and others finish them.

Reading (with detection and cropping) and finishing (pasting, measuring, judging, writing) run in threads of their own
beside the network, and no more pictures are under way than fill its batches, so memory does not grow with the set.
"""

from __future__ import annotations

import hashlib
import os
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from idm_fast import registry
from idm_fast.clean.finish import Finished, Finisher
from idm_fast.clean.listing import Task, content_digest
from idm_fast.clean.manifest import Record
from idm_fast.clean.measure import Identity, device_of
from idm_fast.clean.options import CleanOptions
from idm_fast.errors import IdmFastError
from idm_fast.face_model import FaceModel
from idm_fast.faces.align import AlignedFace
from idm_fast.faces.detect import FaceDetector
from idm_fast.faces.pipeline import crop_of, find_faces, whole_picture
from idm_fast.images import Picture, image_size, read_image

_AHEAD_PIXELS = 30_000_000  # of the pictures under way together; 24 bytes a pixel
_SEEDS = 2**62


@dataclass(frozen=True)
class Setup:
    """All that a worker needs to begin, wherever it runs."""

    source: Path
    out: Path
    model: str
    options: CleanOptions
    aligned: bool


@dataclass
class Work:
    """A picture under way: its faces, which model each goes to, their crops before and after (None: not yet)."""

    task: Task
    picture: Picture | None = None
    faces: list[AlignedFace] = field(default_factory=list)
    models: list[FaceModel] = field(default_factory=list)
    crops: list[Tensor] = field(default_factory=list)
    restored: list[Tensor | None] = field(default_factory=list)
    pixels: int = 0
    digest: str = ""  # of the file that was read
    error: str | None = None

    @property
    def ready(self) -> bool:
        return self.error is not None or all(crop is not None for crop in self.restored)


def reason(error: BaseException) -> str:
    """The message of an exception on one line, with its type where it is none of ours."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if isinstance(error, IdmFastError) else f"{type(error).__name__}: {text}"


def _records(finished: Future[Finished]) -> Iterator[Record]:
    """Of a group, before the error that ended it."""
    group = finished.result()
    yield from group.records
    if group.error is not None:
        raise group.error


class Cleaner:
    """Restores pictures one after another, on one device. Raises ``IdmFastError`` for what ``Setup`` names wrongly."""

    def __init__(self, setup: Setup) -> None:
        self.setup, self.options = setup, setup.options
        self.models = registry.load_models(setup.model, registry.Target(setup.options.device, setup.options.dtype))
        for model in self.models:
            model.evaluations(self.options.sampling)  # builds its table, or says what is wrong
        self.detector = None if setup.aligned else FaceDetector()
        wanted = self.options.max_identity_distance is not None
        self.identity = Identity(device_of(self.models)) if wanted else None

    def run(self, tasks: Sequence[Task]) -> Iterator[Record]:
        """A record for each task, in no fixed order, when its file is in place.

        Whatever is wrong with one picture is its record's ``reason``. Raises ``DiskError`` where nothing can be
        written.
        """
        finisher = Finisher(self.setup, self.identity)
        readers = 1 if self.detector is not None else min(4, os.cpu_count() or 1)
        with ThreadPoolExecutor(readers, "read") as reading, ThreadPoolExecutor(1, "finish") as finishing:
            finishes: deque[Future[Finished]] = deque()
            try:
                for ready in self._restored(tasks, reading):
                    finishes.append(finishing.submit(finisher.finish, ready))
                    # One batch is finished beside the network and one may wait; more would only fill memory.
                    while len(finishes) > 2 or (finishes and finishes[0].done()):
                        yield from _records(finishes.popleft())
                while finishes:
                    yield from _records(finishes.popleft())
            finally:
                for pool in (reading, finishing):  # of a run that ends early, what has not begun is left
                    pool.shutdown(wait=False, cancel_futures=True)

    def _restored(self, tasks: Sequence[Task], reading: ThreadPoolExecutor) -> Iterator[list[Work]]:
        """Pictures in groups, their faces restored; a group is what one network call completed."""
        size = self.options.batch_size
        queues: dict[int, list[tuple[Work, int]]] = {id(model): [] for model in self.models}
        waiting: list[Work] = []  # read, and not given away
        for work in self._read(tasks, reading, waiting):
            waiting.append(work)
            for k, model in enumerate(work.models):
                queues[id(model)].append((work, k))
            # A partial batch goes out only where its pictures hold so much that no further one could be read.
            crowded = sum(each.pixels for each in waiting) > _AHEAD_PIXELS // 2 or len(waiting) >= 4 * size
            for model in self.models:
                queue = queues[id(model)]
                while len(queue) >= size or (queue and crowded):
                    self._batch(model, queue[:size])
                    del queue[:size]
            ready = [each for each in waiting if each.ready]
            if len(ready) >= size or crowded:
                waiting[:] = [each for each in waiting if not each.ready]
                yield ready
        for model in self.models:
            queue = queues[id(model)]
            for first in range(0, len(queue), size):
                self._batch(model, queue[first : first + size])
        if waiting:
            yield waiting

    def _read(self, tasks: Sequence[Task], reading: ThreadPoolExecutor, waiting: list[Work]) -> Iterator[Work]:
        """Pictures in order, read ahead as far as two batches and the bound on pixels allow."""
        ahead: deque[tuple[int, Future[Work]]] = deque()
        left = iter(tasks)
        task = next(left, None)
        while task is not None or ahead:
            while task is not None and len(ahead) < 2 * self.options.batch_size:
                pixels = self._pixels(task)
                held = sum(size for size, _ in ahead) + sum(each.pixels for each in waiting)
                if ahead and held + pixels > _AHEAD_PIXELS:
                    break
                ahead.append((pixels, reading.submit(self._prepare, task, pixels)))
                task = next(left, None)
            yield ahead.popleft()[1].result()

    def _pixels(self, task: Task) -> int:
        """Of a picture that will be decoded, from its header."""
        try:
            width, height = image_size(self.setup.source / task.name) if task.restore else (0, 0)
        except IdmFastError:
            return 0
        return width * height

    def _prepare(self, task: Task, pixels: int) -> Work:
        work = Work(task, pixels=pixels)
        if not task.restore:
            return work
        try:
            work.digest = content_digest((self.setup.source / task.name).read_bytes())
            picture = read_image(self.setup.source / task.name)
            faces = [whole_picture(picture)] if self.detector is None else find_faces(picture, self.detector)
            work.models = [registry.choose(self.models, face.native_px) for face in faces]
            pairs = zip(faces, work.models, strict=True)
            work.crops = [crop_of(picture, face, model.size) for face, model in pairs]
            work.picture, work.faces, work.restored = picture, faces, [None] * len(faces)
        except Exception as error:
            return Work(task, error=self._named(task, error))
        return work

    def _batch(self, model: FaceModel, batch: list[tuple[Work, int]]) -> None:
        """One network call; if it fails, each face is tried alone and the guilty picture is named."""
        try:
            y = torch.stack([work.crops[k] for work, k in batch])
            seeds = torch.tensor([self._seed(work.task) + k for work, k in batch], dtype=torch.int64)
            out = model.restore(y, seeds, self.options.sampling)
        except Exception as error:
            if len(batch) == 1:
                batch[0][0].error = self._named(batch[0][0].task, error)
                return
            for each in batch:
                self._batch(model, [each])
            return
        for (work, k), crop in zip(batch, out, strict=True):
            work.restored[k] = crop

    def _named(self, task: Task, error: Exception) -> str:
        """The reason, with the picture it is of: a network's error knows of none."""
        text, path = reason(error), str(self.setup.source / task.name)
        return text if path in text else f"{path}: {text}"

    def _seed(self, task: Task) -> int:
        """By the picture's name: one noise for all would leave its print on the whole set, and a number by order would
        change when a picture is added."""
        text = f"{self.options.seed}\0{task.name}".encode(errors="surrogateescape")
        return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big") % _SEEDS
