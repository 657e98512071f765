"""The captured graphs of plans that take turns: one memory pool, a bound on it, and who goes when it is reached."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import count
from threading import RLock

import torch

from idm_fast.engine.runtime import Graph, Runtime, Settings, Work
from idm_fast.errors import IdmFastError

MOST_BYTES = 2**30  # of a pool's graphs; the one in use may be larger

# ("walk", evaluations), ("setup", 0), ("step", 0) or, reusing the inner levels, ("step", 1), and of latents
# ("finish", 0); of an autoencoder ("encode", 0), ("decode", 0) and, without its codebook, ("decode_as_is", 0).
Key = tuple[str, int]


@dataclass(frozen=True)
class Kept:
    graph: Graph
    nbytes: int  # beside the pool
    settings: Settings


class GraphPool:
    """The graphs of plans that take turns: one memory pool for what they need between their calls.

    Past ``limit`` bytes the graph that was not used for longest goes, and is captured again when it is asked for.
    """

    def __init__(self, runtime: Runtime, limit: int = MOST_BYTES) -> None:
        self.runtime, self.limit = runtime, limit
        self.captures = 0  # how often it was done, for tests and tables
        self._kept: OrderedDict[tuple[int, Key], Kept] = OrderedDict()
        self._pool: object = None
        self._pooled = 0
        self._abandoned: deque[int] = deque()
        self._lock = RLock()
        self._owners = count()

    def new_owner(self) -> int:
        """A number that no other plan of the pool has."""
        return next(self._owners)

    @property
    def nbytes(self) -> int:
        self._bury()
        return self._pooled + sum(kept.nbytes for kept in self._kept.values())

    def abandon(self, owner: int) -> None:
        """Its plan is gone. Python may say so at any moment, in any thread: what is to be done is done later."""
        self._abandoned.append(owner)

    def _bury(self) -> None:
        while self._abandoned:
            self.release(self._abandoned.popleft())

    def has(self, owner: int, keys: Iterable[Key]) -> bool:
        return all((owner, key) in self._kept for key in keys)

    def capture(self, owner: int, works: Mapping[Key, Work]) -> None:
        """Keeps the graph of each that is missing; where memory runs out, once more without all others."""
        with self._lock:
            self._bury()
            try:
                self._capture(owner, works)
            except torch.OutOfMemoryError:
                if not self._kept:
                    raise
                self.release()
                self._capture(owner, works)
            others = [which for which in self._kept if which not in {(owner, key) for key in works}]
            while self.nbytes > self.limit and others:
                self._drop(others.pop(0))
                self._measure()

    def replay(self, owner: int, key: Key) -> None:
        """Raises ``IdmFastError`` where torch is set otherwise than when it was captured, or where it is gone."""
        with self._lock:
            kept = self._kept.get((owner, key))
            if kept is None:
                raise IdmFastError(
                    "Engine: load must come before step, got a graph that is released or not captured yet"
                )
            now = self.runtime.settings()
            for name, value in kept.settings.items():
                if now[name] != value:
                    raise IdmFastError(
                        f"Engine: {name} must be as when the graph was captured = {value}, got {now[name]}; set it "
                        "back, or call release_graphs() to have it captured anew"
                    )
            self._kept.move_to_end((owner, key))
            kept.graph.replay()

    def release(self, owner: int | None = None) -> None:
        """Forgets the graphs of one plan, or all."""
        with self._lock:
            for which in [each for each in self._kept if owner in (None, each[0])]:
                self._drop(which)
            self._measure()

    def _capture(self, owner: int, works: Mapping[Key, Work]) -> None:
        try:
            for key, work in works.items():
                if (owner, key) in self._kept:
                    continue
                if self._pool is None:
                    self._pool = self.runtime.new_pool()
                settings = self.runtime.settings()
                graph, nbytes = self.runtime.capture(work, self._pool)
                self._kept[owner, key] = Kept(graph, nbytes, settings)
                self.captures += 1
        finally:
            self._measure()

    def _drop(self, which: tuple[int, Key]) -> None:
        self.runtime.settle()  # it may be running
        self._kept.pop(which).graph.reset()

    def _measure(self) -> None:
        if not self._kept:
            self._pool = None  # torch gives up a pool with its last graph, and its name must not come again
        self._pooled = 0 if self._pool is None else self.runtime.pool_bytes(self._pool)
