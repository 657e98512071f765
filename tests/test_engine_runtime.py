"""What the one layer above CUDA asks of torch.cuda, and in which order; a mock of that module takes the calls."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from unittest.mock import MagicMock, call

import pytest
import torch

from idm_fast.engine import runtime
from idm_fast.engine.runtime import CudaRuntime, HostRuntime, runtime_of
from idm_fast.errors import IdmFastError

POOL = (0, 7)


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[MagicMock]:
    mock = MagicMock(spec=torch.cuda)  # a name that torch.cuda has not got is an error
    mock.current_device.return_value = 0
    mock.is_current_stream_capturing.return_value = False
    free = iter(range(10**9, 0, -1000))
    mock.mem_get_info.side_effect = lambda device: (next(free), 10**9)
    mock.memory_snapshot.return_value = [
        {"device": 0, "segment_pool_id": POOL, "total_size": 300},
        {"device": 0, "segment_pool_id": (0, 8), "total_size": 1},
        {"device": 1, "segment_pool_id": POOL, "total_size": 2},
    ]
    mock.CUDAGraph.return_value = MagicMock(spec=torch.cuda.CUDAGraph)
    monkeypatch.setattr(runtime, "cuda", mock)
    yield mock
    runtime._lost.clear()


def test_a_capture(cuda: MagicMock) -> None:
    here, graph, seen = CudaRuntime(torch.device("cuda")), cuda.CUDAGraph.return_value, []

    def work() -> None:
        seen.append((gc.isenabled(), torch.is_inference_mode_enabled(), torch.is_grad_enabled()))

    with torch.inference_mode():
        captured, nbytes = here.capture(work, POOL)
    assert captured is graph
    assert nbytes == 1000  # of the free memory, none of it the pool's
    assert seen == [(False, False, False)]
    assert gc.isenabled()
    assert graph.mock_calls == [call.capture_begin(pool=POOL, capture_error_mode="thread_local"), call.capture_end()]
    cuda.stream.assert_called_once_with(here._stream)
    names = [each[0] for each in cuda.mock_calls]
    assert names.index("synchronize") < names.index("empty_cache") < names.index("CUDAGraph")
    assert here.pool_bytes(POOL) == 300


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("no room"), ValueError("a mistake"), KeyboardInterrupt()])
def test_a_capture_that_fails_is_undone(cuda: MagicMock, monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    graph, allocator = cuda.CUDAGraph.return_value, MagicMock()
    for name in ("_cuda_endAllocateToPool", "_cuda_releasePool"):
        monkeypatch.setattr(torch._C, name, getattr(allocator, name), raising=False)
    graph.capture_end.side_effect = RuntimeError("capture invalidated")

    def work() -> None:
        raise error

    with pytest.raises(type(error)) as raised:
        CudaRuntime(torch.device("cuda")).capture(work, POOL)
    assert raised.value is error
    assert allocator.mock_calls == [call._cuda_endAllocateToPool(0, POOL), call._cuda_releasePool(0, POOL)]
    graph.reset.assert_called_once()
    assert runtime._lost == [graph]
    cuda.stream.return_value.__exit__.assert_called_once()
    assert gc.isenabled()


def test_a_graph_that_cannot_be_instantiated_is_out_of_memory(cuda: MagicMock) -> None:
    cuda.CUDAGraph.return_value.capture_end.side_effect = RuntimeError("CUDA error: out of memory")
    with pytest.raises(torch.OutOfMemoryError, match="CUDA error: out of memory"):
        CudaRuntime(torch.device("cuda")).capture(lambda: None, POOL)


def test_turns_wait_for_the_turn_before_on_any_stream(cuda: MagicMock) -> None:
    here = CudaRuntime(torch.device("cuda", 1))
    for stream in (MagicMock(), MagicMock()):
        cuda.current_stream.return_value = stream
        with here.turn():
            stream.wait_event.assert_called_once_with(here._last)
            assert call(stream) not in here._last.record.mock_calls
        assert here._last.record.mock_calls[-1] == call(stream)
    cuda.device.assert_called_with(torch.device("cuda", 1))
    cuda.is_current_stream_capturing.return_value = True
    with pytest.raises(IdmFastError, match="outside the capture of a CUDA graph"), here.turn():
        pass


def test_a_warm_up_is_on_the_stream_of_captures(cuda: MagicMock) -> None:
    here, current = CudaRuntime(torch.device("cuda")), cuda.current_stream.return_value
    here.warm_up(lambda: here._stream.wait_stream.assert_called_once_with(current))
    current.wait_stream.assert_called_once_with(here._stream)


def test_settings_and_times(cuda: MagicMock) -> None:
    here = CudaRuntime(torch.device("cuda"))
    assert here.settings() == here.settings()
    assert len(here.settings()) == 5
    cuda.Event.return_value.elapsed_time.return_value = 2.0
    assert here.seconds(lambda: None) == 2e-3
    here.settle()
    here._last.synchronize.assert_called()


def test_a_cpu_has_none_of_it() -> None:
    host = runtime_of(torch.device("cpu"))
    assert isinstance(host, HostRuntime)
    with host.turn():
        assert host.seconds(lambda: None) >= 0
    host.warm_up(lambda: None)
    host.settle()
    assert (host.captures, host.new_pool(), host.pool_bytes(None), host.settings()) == (False, None, 0, {})
    with pytest.raises(NotImplementedError):
        host.capture(lambda: None, None)
