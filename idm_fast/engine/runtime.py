"""The one place that touches the CUDA runtime: streams, events, graphs, memory. Tests put a fake in its stead."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from threading import RLock
from typing import Any, Protocol

import torch

from idm_fast.errors import IdmFastError

cuda: Any = torch.cuda  # much of it has no types
Work = Callable[[], object]
Settings = dict[str, object]


class Graph(Protocol):
    def replay(self) -> None: ...

    def reset(self) -> None: ...


class Runtime(Protocol):
    """What an engine needs of a device beyond tensors. ``captures``: whether it has graphs."""

    captures: bool

    def turn(self) -> AbstractContextManager[None]:
        """Work inside the block is queued behind that of every block before, whatever stream each was on."""

    def warm_up(self, work: Work) -> None:
        """Runs ``work`` where a capture would record it: compilers, tuners and libraries do here what they must."""

    def new_pool(self) -> object:
        """A memory pool for graphs that never run at the same time."""

    def capture(self, work: Work, pool: object) -> tuple[Graph, int]:
        """(Graph of ``work``, which does not run now; bytes it takes beside its pool)."""

    def pool_bytes(self, pool: object) -> int: ...

    def settle(self) -> None:
        """Returns when all that was queued in turns has run."""

    def settings(self) -> Settings:
        """What torch consults while it launches, so that a graph holds one answer for ever."""

    def seconds(self, work: Work) -> float: ...


class HostRuntime:
    """A CPU: everything has happened when a call returns."""

    captures = False

    def turn(self) -> AbstractContextManager[None]:
        return nullcontext()

    def warm_up(self, work: Work) -> None:
        work()

    def new_pool(self) -> object:
        return None

    def capture(self, work: Work, pool: object) -> tuple[Graph, int]:
        raise NotImplementedError("a CPU has no graphs")

    def pool_bytes(self, pool: object) -> int:
        return 0

    def settle(self) -> None:
        pass

    def settings(self) -> Settings:
        return {}

    def seconds(self, work: Work) -> float:
        began = time.perf_counter()
        work()
        return time.perf_counter() - began


# One capture or warm-up in the process at a time: torch allows one capture, and a warm-up may wait for the device,
# which is forbidden while another thread captures on it.
_capturing = RLock()
_lost: list[torch.cuda.CUDAGraph] = []  # of captures that failed


class CudaRuntime:
    """``torch.cuda`` of one device."""

    captures = True

    def __init__(self, device: torch.device) -> None:
        index = cuda.current_device() if device.index is None else device.index
        self.device = torch.device("cuda", index)
        self._stream = cuda.Stream(self.device)  # of all captures: graphs that share a pool must share it
        self._last = cuda.Event()

    @contextmanager
    def turn(self) -> Iterator[None]:
        with cuda.device(self.device):
            if cuda.is_current_stream_capturing():
                raise IdmFastError("Engine: run must be outside the capture of a CUDA graph, got the inside of one")
            stream = cuda.current_stream()
            stream.wait_event(self._last)
            try:
                yield
            finally:
                self._last.record(stream)

    def warm_up(self, work: Work) -> None:
        with _capturing:
            current = cuda.current_stream(self.device)
            self._stream.wait_stream(current)
            with cuda.stream(self._stream):
                work()
            current.wait_stream(self._stream)

    def new_pool(self) -> object:
        return cuda.graph_pool_handle()

    def capture(self, work: Work, pool: object) -> tuple[Graph, int]:
        with _capturing, _no_collection():
            cuda.synchronize(self.device)
            cuda.empty_cache()  # memory that lies in torch's cache is of no use to the pool
            free, pooled = cuda.mem_get_info(self.device)[0], self.pool_bytes(pool)
            graph = self._captured(work, pool)
            taken = free - cuda.mem_get_info(self.device)[0]
            return graph, max(0, taken - (self.pool_bytes(pool) - pooled))

    def _captured(self, work: Work, pool: Any) -> torch.cuda.CUDAGraph:
        # As `torch.cuda.graph` does it, which after an error inside leaves its stream the current one.
        graph: torch.cuda.CUDAGraph = cuda.CUDAGraph()
        # Inside inference mode torch would make the graph's own state of tensors that no replay may write.
        with torch.inference_mode(False), torch.no_grad(), cuda.stream(self._stream):
            # Other threads may allocate and copy meanwhile; only this one is held to what a capture allows.
            graph.capture_begin(pool=pool, capture_error_mode="thread_local")
            try:
                work()
                graph.capture_end()
            except BaseException as error:
                self._abandon(graph, pool)
                if "out of memory" in str(error) and not isinstance(error, torch.OutOfMemoryError):
                    raise torch.OutOfMemoryError(str(error)) from None  # a graph that cannot be instantiated
                raise
        return graph

    def _abandon(self, graph: torch.cuda.CUDAGraph, pool: Any) -> None:
        """Undoes a capture that failed; what it raises on the way is not the reason."""
        with suppress(RuntimeError):
            graph.capture_end()
        # Where the capture had become invalid, torch's allocator has not been told of the end, and still asks this
        # object what belongs to it: it must live.
        _lost.append(graph)
        with suppress(RuntimeError, AttributeError):
            allocator: Any = torch._C
            allocator._cuda_endAllocateToPool(self.device.index, pool)
            allocator._cuda_releasePool(self.device.index, pool)
        with suppress(RuntimeError):
            graph.reset()

    def pool_bytes(self, pool: object) -> int:
        total = 0
        for segment in cuda.memory_snapshot():
            if segment["device"] == self.device.index and tuple(segment["segment_pool_id"]) == pool:
                total += int(segment["total_size"])
        return total

    def settle(self) -> None:
        self._last.synchronize()

    def settings(self) -> Settings:
        backends: Any = torch.backends
        return {
            "torch.backends.cuda.matmul.fp32_precision": backends.cuda.matmul.fp32_precision,
            "torch.backends.cudnn.conv.fp32_precision": backends.cudnn.conv.fp32_precision,
            "torch.backends.cudnn.enabled": backends.cudnn.enabled,
            "torch.backends.cudnn.deterministic": backends.cudnn.deterministic,
            "torch.are_deterministic_algorithms_enabled()": torch.are_deterministic_algorithms_enabled(),
        }

    def seconds(self, work: Work) -> float:
        """The device's own time of one call, launches included where they take longer."""
        with cuda.device(self.device):
            begin, end = (cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            work()
            end.record()
            end.synchronize()
            return float(begin.elapsed_time(end)) / 1e3


def runtime_of(device: torch.device) -> Runtime:
    return CudaRuntime(device) if device.type == "cuda" else HostRuntime()


@contextmanager
def _no_collection() -> Iterator[None]:
    """What Python collects in the middle of a capture may free device memory, and the capture is lost."""
    gc.collect()
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
