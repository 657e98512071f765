"""Program: native calls recorded once and run without Python between them."""

from __future__ import annotations

import gc
import math
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from idm_fast.kernels import extension
from idm_fast.kernels.case import Outputs
from idm_fast.kernels.dispatch import Op
from idm_fast.kernels.program import Program, bind_advance, bind_table_row, joined
from idm_fast.ops import (
    OPS,
    BackendError,
    PackedWeight,
    channel_stats,
    conv2d,
    conv2d_stats,
    norm_coefficients,
    sampler_update,
    suite,
    use_backend,
)

pytestmark = pytest.mark.skipif(extension.native is None, reason=str(extension.missing))

ROWS = torch.tensor(
    [
        [1.25, -0.75, 0.33, 0.71, 0.0, 0.1, 1.0, 0.0],
        [0.8, -0.6, 0.33, 0.71, -0.2, 0.1, 1.0, 0.0],
        [0.0, 1.0, 0.0, 1.0, 0.0, 0.0, 1.0, 0.0],
    ]
)
SEEDS = torch.tensor([5, 6])


def image(*shape: int, seed: int = 0) -> Tensor:
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return noise.contiguous(memory_format=torch.channels_last)


def counter(value: int = 0) -> Tensor:
    return torch.tensor([value])


def record_update(program: Program, x: Tensor, step: Tensor) -> None:
    arguments = (x, image(*x.shape, seed=1), torch.full_like(x, math.nan), ROWS, step, SEEDS[: len(x)])
    program.record("sampler_update", *arguments, None, None, 1, None)


def test_a_loop_is_what_its_calls_are() -> None:
    x, output, step = image(2, 3, 6, 5), image(2, 3, 6, 5, seed=1), counter()
    expected, history = x.clone(), torch.full_like(x, math.nan)
    with use_backend("cpu"):
        for index in range(3):
            sampler_update(expected, output, history, ROWS, index, SEEDS)
    program = Program()
    record_update(program, x, step)
    program.add(bind_advance(step))
    assert (len(program), program.names) == (2, ["sampler_update", "advance"])
    gc.collect()  # nothing but the program holds the tensors
    program.run(3)
    assert torch.equal(x, expected)
    assert step.item() == 3


@pytest.mark.parametrize("name", [name for name in OPS if "cpu" in OPS[name].backends])
def test_every_operation(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every case gives the same bits through a program as by a call."""
    cases = [case for case in suite(name).tested if case.bytes_moved(torch.float32) < 2**18]
    jobs = [(case, dtype) for case in cases for dtype in suite(name).dtypes]
    recorded = 0

    def choose(op: Op, device: torch.device, dtype: torch.dtype, *args: Any) -> Callable[..., Any]:
        original(op, device, dtype, *args)  # its limits refuse what the native code cannot run

        def run(*args: Any) -> Any:
            nonlocal recorded
            recorded += 1
            program = Program()
            result = program.record(op.name, *args)
            program.run()
            return result

        return run

    def results() -> list[Outputs | None]:
        found: list[Outputs | None] = []
        for case, dtype in jobs:
            try:
                with use_backend("cpu"):
                    found.append(suite(name).call(case.inputs(dtype)))
            except BackendError:
                found.append(None)
        return found

    expected, original = results(), Op.choose
    monkeypatch.setattr(Op, "choose", choose)
    OPS[name]._forget()  # calls remembered from before would go around the choice
    for job, one, other in zip(jobs, results(), expected, strict=True):
        assert (one is None) == (other is None)
        if one is not None and other is not None:
            assert all(torch.equal(one[key], other[key]) for key in one), job[0].name
    assert recorded > 0


def test_joined() -> None:
    step, seen = counter(), []
    one = bind_advance(step)
    calls = joined([one, one, lambda: seen.append(step.item()), one, lambda: None])
    assert len(calls) == 4
    for call in calls:
        call()
    assert seen == [2]
    assert step.item() == 3
    assert joined([]) == []


def test_results_that_are_made_on_the_way() -> None:
    x, weight = image(2, 8, 6, 6), torch.linspace(0.5, 2, 8)
    with use_backend("cpu"):
        stats = channel_stats(x)
        expected = norm_coefficients(stats, 4, weight)
    for tensor in stats:
        tensor.fill_(math.nan)
    out, program = torch.full_like(expected, math.nan), Program()
    program.record("channel_stats", x, stats)
    program.record("norm_coefficients", stats, 4, weight, None, 1e-5, None, None, None, out)
    noise = program.record("philox_normal", SEEDS, (2, 3, 4, 4), -1)
    assert out.isnan().all()  # nothing has run
    program.run()
    assert torch.equal(out, expected)
    assert noise.std().item() == pytest.approx(1, abs=0.3)


@pytest.mark.parametrize(("at", "row"), [(0, 0), (1, 1), (2, 2), (7, 2), (-1, 0)])
@pytest.mark.parametrize("shape", [(8,), (3, 8)])
def test_table_row(at: int, row: int, shape: tuple[int, ...]) -> None:
    out, program = torch.full(shape, math.nan), Program()
    program.add(bind_table_row(ROWS, counter(at), out))
    program.run()
    assert torch.equal(out, ROWS[row].expand(shape))


def test_threads_are_those_of_the_run() -> None:
    results, threads = [], torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            x, program = image(1, 3, 128, 128), Program()
            record_update(program, x, counter())
            torch.set_num_threads(count)
            program.run()
            results.append(x)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_a_failing_call_is_named() -> None:
    program, step = Program(), counter()
    program.add(bind_advance(step))
    program.record("sampler_update", *(image(1, 3, 4, 4) for _ in range(3)), ROWS, 9, SEEDS)
    program.add(bind_advance(step))
    with pytest.raises(ValueError, match=r"program: call 1 \(sampler_update\): sampler_update: step must be a row"):
        program.run()
    assert step.item() == 1
    program.add(bind_advance(step))  # still usable: it is not running any more
    assert len(program) == 4


def test_refusals() -> None:
    program, x = Program(), image(1, 3, 4, 4)
    with pytest.raises(ValueError, match="program: op must be an operation with a cpu backend, got 'fly'"):
        program.record("fly", x)
    with pytest.raises(ValueError, match="program: op must be an operation with a cpu backend, got 'time_embedding'"):
        program.record("time_embedding", x)
    with pytest.raises(ValueError, match="program: tensors of sampler_update must be on the device = cpu, got meta"):
        program.record("sampler_update", x.to("meta"))
    with pytest.raises(ValueError, match="program: repeats must be >= 0, got -1"):
        program.run(-1)
    with pytest.raises(TypeError):
        program.record("attention", x)
    assert len(program) == 0
    for out in (torch.zeros(7), torch.zeros(8, dtype=torch.int32), torch.zeros(2, 16)[:, ::2]):
        program = Program()
        program.add(bind_table_row(ROWS, counter(), out))
        with pytest.raises(ValueError, match=r"call 0 \(table_row\): table_row: out must be contiguous float32"):
            program.run()
    program = Program()
    program.add(bind_advance(torch.zeros(1)))
    with pytest.raises(ValueError, match="advance: counter must be int64"):
        program.run()


def test_python_goes_on_beside_it_and_can_stop_it() -> None:
    """The GIL is free while it runs, calls cannot be recorded then, and Ctrl-C ends it between two repeats."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores Ctrl-C
    program, step = Program(), counter()
    record_update(program, image(1, 3, 64, 64), step)
    program.add(bind_advance(step))
    seen: list[str] = []

    def beside() -> None:
        while step.item() < 10:
            time.sleep(0.001)
        try:
            program.add(bind_advance(step))
        except ValueError as error:
            seen.append(str(error))
        signal.raise_signal(signal.SIGINT)

    thread = threading.Thread(target=beside)
    thread.start()
    try:
        with pytest.raises(KeyboardInterrupt):
            program.run(10**9)
    finally:
        signal.signal(signal.SIGINT, before)
    thread.join()
    assert seen == ["program: calls must be recorded before it runs, got a call while it runs"]
    assert 10 <= step.item() < 10**9


def test_a_convolution_in_a_program() -> None:
    """What the engine does: packed weights, room for statistics, other weights while the program stays as it is."""
    x, first, second = image(2, 8, 9, 5), image(20, 8, 3, 3, seed=1), image(20, 8, 3, 3, seed=2)
    weight = PackedWeight(first.clone(memory_format=torch.preserve_format))
    with use_backend("cpu"):
        room = conv2d_stats(x, weight)
    out, program = torch.full((2, 9, 5, 20), math.nan).permute(0, 3, 1, 2), Program()
    options = (None, None, False, None, None, None, None, None, True, out, room)
    result = program.record("conv2d", x, weight, None, 1, False, *options)
    assert result[0] is out
    for values in (first, second):
        weight.load(values)
        program.run()
        with use_backend("cpu"):
            expected, stats = conv2d(x, values, with_stats=True)
        assert torch.equal(out, expected)
        assert torch.equal(room.partials, stats.partials)
        assert torch.equal(room.counts, stats.counts)


def test_torch_s_number_of_threads_does_the_work() -> None:
    """A fresh process has no team of threads until somebody asks for one; the tensors are too small for torch to."""
    script = """
import os, torch
from idm_fast.kernels.conv2d import bind_conv2d
from idm_fast.kernels.program import Program
torch.set_num_threads(3)
x, weight = (torch.ones(s).to(memory_format=torch.channels_last) for s in ((1, 4, 32, 32), (4, 4, 3, 3)))
program = Program()
program.add(bind_conv2d(x, weight, out=torch.empty_like(x)))
before = len(os.listdir("/proc/self/task"))
program.run()
print(len(os.listdir("/proc/self/task")) - before)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=120)
    assert int(done.stdout) >= 2, done.stdout
