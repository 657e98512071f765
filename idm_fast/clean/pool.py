"""Several worker processes on one machine: a worker that dies is replaced, and its pictures are done again."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from typing import Any

import torch

from idm_fast.clean.finish import failed
from idm_fast.clean.listing import Task
from idm_fast.clean.manifest import DiskError, Record
from idm_fast.clean.work import Cleaner, Setup, reason
from idm_fast.errors import IdmFastError

_CHUNK_BATCHES = (
    4  # a worker's pipeline runs dry between two chunks, so not too small; lost with a worker, so not large
)
_TRIES = 3  # of a picture whose worker dies


def run_workers(setup: Setup, tasks: Sequence[Task], workers: int) -> Iterator[Record]:
    """The records of all tasks, made by ``workers`` processes; see ``Cleaner.run``.

    Pictures of a worker that dies are given out again, now one by one; one whose worker dies three times is recorded as
    failed. Raises ``IdmFastError`` where a worker cannot begin at all.
    """
    pool = _Pool(setup, tasks, workers)
    try:
        yield from pool.records()
    finally:
        pool.stop()


class _Worker:
    """One process, the pipe to it, and the pictures it has."""

    def __init__(self, setup: Setup, threads: int) -> None:
        # Not forked from here: copies of torch's threads would hang. From a server that has imported all, and run none.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([Cleaner.__module__])
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, setup, threads), daemon=True)
        self.process.start()
        theirs.close()  # or its end would never be seen
        self.has: dict[str, Task] = {}
        self.begun = False


class _Pool:
    def __init__(self, setup: Setup, tasks: Sequence[Task], workers: int) -> None:
        self.setup = setup
        self.fresh = iter(tasks)
        self.again: deque[Task] = deque()
        self.tries: dict[str, int] = {}
        self.chunk = _CHUNK_BATCHES * setup.options.batch_size
        self.threads = max(1, torch.get_num_threads() // workers)
        count = min(workers, -(-len(tasks) // self.chunk))  # no more than there are chunks
        self.workers = [_Worker(setup, self.threads) for _ in range(count)]

    def records(self) -> Iterator[Record]:
        while self.workers:
            ready = wait([worker.pipe for worker in self.workers])
            for worker in [each for each in self.workers if each.pipe in ready]:
                try:
                    kind, value = worker.pipe.recv()
                except (EOFError, OSError):
                    yield from self._lost(worker)
                    continue
                if kind == "record":
                    worker.has.pop(value["file"], None)
                    yield value
                elif kind == "idle":
                    worker.begun = True
                    self._feed(worker)
                else:
                    raise DiskError(value) if kind == "disk" else IdmFastError(value)

    def _feed(self, worker: _Worker) -> None:
        """The next chunk; a picture that was with a worker when it died goes alone, so that the guilty one is found."""
        chunk = [self.again.popleft()] if self.again else list(itertools.islice(self.fresh, self.chunk))
        worker.has = {task.name: task for task in chunk}
        with suppress(OSError):  # it has died: its pipe says so next
            worker.pipe.send(chunk)
        if not chunk:
            self._end(worker)

    def _lost(self, worker: _Worker) -> Iterator[Record]:
        worker.process.join()
        if not worker.begun:
            raise IdmFastError(f"a worker must begin, got one that ended with exit code {worker.process.exitcode}")
        self._end(worker)
        for task in worker.has.values():
            self.tries[task.name] = self.tries.get(task.name, 0) + 1
            if self.tries[task.name] < _TRIES:
                self.again.append(task)
            else:
                source = self.setup.source / task.name
                yield failed(task, f"{source}: its worker died {_TRIES} times, last with {worker.process.exitcode}")
        self.workers.append(_Worker(self.setup, self.threads))

    def _end(self, worker: _Worker) -> None:
        self.workers.remove(worker)
        worker.pipe.close()

    def stop(self) -> None:
        for worker in self.workers:
            worker.process.terminate()
        for worker in self.workers:
            worker.process.join()
            worker.pipe.close()


def _serve(pipe: Connection, setup: Setup, threads: int) -> None:
    """A worker's life: chunks of tasks come in, their records go out, an empty chunk ends it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent ends its workers
    threading.Thread(target=_die_with_parent, daemon=True).start()
    torch.set_num_threads(threads)
    with suppress(BrokenPipeError):
        try:
            cleaner = Cleaner(setup)
            pipe.send(("idle", None))
            while chunk := pipe.recv():
                for record in cleaner.run(chunk):
                    pipe.send(("record", record))
                pipe.send(("idle", None))
        except DiskError as error:
            pipe.send(("disk", str(error)))
        except EOFError:
            return
        except Exception as error:
            pipe.send(("error", reason(error)))


def _die_with_parent() -> None:
    """A run that was killed must not go on writing: the next one may be at work already."""
    parent: Any = multiprocessing.parent_process()
    wait([parent.sentinel])
    os._exit(1)
