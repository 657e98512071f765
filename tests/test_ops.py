"""Every operation x backend x case x dtype against the float64 reference, generated from the tables.

The rule: max|out - ref64| <= 2 * max|torch in the same dtype - ref64| + eps. Outputs start as NaN.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import pytest
import torch

from idm_fast.kernels import extension
from idm_fast.kernels.case import Case, Outputs, verdict
from idm_fast.ops import BACKENDS, OPS, BackendError, group_norm_silu, suite, use_backend

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
INTERPRETED_ELEMENTS = 21_000  # the interpreter runs a program at a time: larger cases would take minutes


def place(name: str, backend: str) -> str:
    """Where a backend is judged: on the device if there is one and it runs there, else on the CPU."""
    return DEVICE if DEVICE in OPS[name].backends[backend].devices else "cpu"


def matrix() -> list[Any]:
    rows = []
    for name in OPS:
        for case in suite(name).tested:
            for dtype in suite(name).dtypes:
                for backend in BACKENDS:
                    if backend in OPS[name].backends:
                        short = str(dtype).removeprefix("torch.")
                        marks = [pytest.mark.gpu] if place(name, backend) == "cuda" else []
                        called = f"{name}-{case.name}-{short}-{backend}"
                        rows.append(pytest.param(name, case, dtype, backend, id=called, marks=marks))
    return rows


@cache
def truth(name: str, case: Case, dtype: torch.dtype, device: str) -> tuple[Outputs, Outputs]:
    """(float64 reference, torch in the same dtype) of one case, shared by all backends of a device."""
    inputs = case.inputs(dtype, device)
    with use_backend("torch"):
        return suite(name).exact(inputs), suite(name).call(inputs)


def run(name: str, case: Case, dtype: torch.dtype, backend: str) -> Outputs:
    """Runs the case, or skips it with the backend's own reason."""
    device = place(name, backend)
    inputs = case.inputs(dtype, device)
    values = [*inputs.values(), *truth(name, case, dtype, device)[0].values()]
    parts = [part for value in values for part in (value if isinstance(value, tuple) else (value,))]
    largest = max(part.numel() for part in parts if isinstance(part, torch.Tensor))
    if backend == "triton" and device == "cpu" and largest > INTERPRETED_ELEMENTS:
        pytest.skip("too large for Triton's interpreter")
    try:
        with use_backend(backend):
            return suite(name).call(inputs)
    except BackendError:
        reason = OPS[name].why_not(backend, device, dtype) or "refused by its limits"
        pytest.skip(f"{backend}: {reason}")


def judge(out: Outputs, name: str, case: Case, dtype: torch.dtype, ulps: float = 0.0) -> None:
    device = next(iter(out.values())).device.type
    wrong = verdict(out, *truth(name, case, dtype, device), ulps)
    assert wrong is None, f"{case.name} ({case.why}): {wrong}"


@pytest.mark.parametrize(("name", "case", "dtype", "backend"), matrix())
def test_matches_float64(name: str, case: Case, dtype: torch.dtype, backend: str) -> None:
    out = run(name, case, dtype, backend)
    # Triton's interpreter cuts bfloat16 off where a device rounds.
    interpreted = backend == "triton" and place(name, backend) == "cpu"
    judge(out, name, case, dtype, ulps=1.0 if interpreted and dtype == torch.bfloat16 else 0.0)
    if interpreted and dtype != torch.float32:
        return  # slow, and the same code as in float32
    again = run(name, case, dtype, backend)
    for key, value in out.items():
        assert torch.equal(value, again[key]), f"{key}: two runs differ"


@pytest.fixture
def native() -> Any:
    if extension.native is None:
        pytest.skip(str(extension.missing))
    yield extension.native
    extension.native.set_cpu_isa("")


ISAS = extension.native.cpu_isas()[1:] if extension.native else []
NATIVE_OPS = [name for name in OPS if "cpu" in OPS[name].backends]


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", NATIVE_OPS)
def test_every_instruction_set(native: Any, name: str, dtype: torch.dtype, isa: str) -> None:
    native.set_cpu_isa(isa)
    for case in suite(name).tested:
        with use_backend("cpu"):
            judge(suite(name).call(case.inputs(dtype)), name, case, dtype)


@pytest.mark.parametrize("name", NATIVE_OPS)
def test_threads_do_not_change_bits(native: Any, name: str) -> None:
    threads = torch.get_num_threads()
    try:
        for case in suite(name).tested:
            inputs = case.inputs(torch.bfloat16)
            results = []
            for count in (1, 2, 3):
                torch.set_num_threads(count)
                with use_backend("cpu"):
                    results.append(suite(name).call(inputs))
            for other in results[1:]:
                assert all(torch.equal(other[key], value) for key, value in results[0].items()), case.name
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("name", NATIVE_OPS)
def test_two_threads_at_once_get_the_same_bits(native: Any, name: str) -> None:
    """As two restorers in two threads would; native code runs without Python's lock."""
    cases = [case for case in suite(name).tested if case.bytes_moved(torch.float32) < 2**20]
    jobs = [(case, dtype) for case in cases for dtype in suite(name).dtypes]

    def work(offset: int) -> dict[int, Outputs]:
        found = {}
        for turn in range(len(jobs)):  # each thread begins elsewhere, so that different shapes meet
            index = (turn + offset) % len(jobs)
            case, dtype = jobs[index]
            try:
                with use_backend("cpu"):
                    found[index] = suite(name).call(case.inputs(dtype))
            except BackendError:
                continue  # refused by its limits
        return found

    alone = work(0)
    with ThreadPoolExecutor(2) as pool:
        for together in pool.map(work, (0, len(jobs) // 2)):
            assert together.keys() == alone.keys()
            for index, expected in alone.items():
                for key, value in expected.items():
                    assert torch.equal(together[index][key], value), f"{jobs[index][0].name}: {key}"


def test_silu_of_extreme_values(native: Any) -> None:
    """weight 3e38 on normalised +-1: silu is the identity on one side and zero on the other, not a ratio of limits."""
    sizes = torch.tensor([80.0, 87.0, 88.0, 100.0, 1e10, 3e38])
    x = torch.tensor([1.0, -1.0]).repeat(len(sizes)).reshape(1, -1, 1, 1)
    expected = torch.nn.functional.silu((x.flatten() * sizes.repeat_interleave(2)).double())
    for isa in native.cpu_isas():
        native.set_cpu_isa(isa)
        with use_backend("cpu"):
            y = group_norm_silu(x, len(sizes), sizes.repeat_interleave(2), eps=0.0)
        torch.testing.assert_close(y.flatten().double(), expected, rtol=1e-6, atol=2e-36, msg=isa)


@pytest.mark.skipif(extension.native is None, reason="native module missing")
def test_half_conversions_are_torchs() -> None:
    """Every bf16 and fp16 bit pattern survives a load and a store; float32 rounds as torch rounds."""
    patterns = torch.arange(2**16, dtype=torch.int32).to(torch.int16)
    generator = torch.Generator().manual_seed(0)
    floats = torch.randint(-(2**31), 2**31 - 1, (1, 1, 256, 256), generator=generator, dtype=torch.int64)
    floats = floats.to(torch.int32).view(torch.float32)
    row = torch.tensor([[0.0, 1.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0]])
    seed = torch.zeros(1, dtype=torch.int64)
    try:
        for isa in extension.native.cpu_isas():
            extension.native.set_cpu_isa(isa)
            for dtype in (torch.bfloat16, torch.float16):
                for source in (patterns.view(dtype).reshape(1, 1, 256, 256), floats):
                    x, history = torch.zeros(1, 1, 256, 256), torch.zeros(1, 1, 256, 256)
                    target = torch.zeros(1, 1, 256, 256, dtype=dtype)
                    with use_backend("cpu"):
                        OPS["sampler_update"].run(x.device, source.dtype, x, source, history, row, 0, seed, target)
                    torch.testing.assert_close(history, source.float(), rtol=0, atol=0, equal_nan=True)
                    # The bf16 instruction of AVX-512 writes zero for subnormal numbers.
                    tiny = torch.finfo(dtype).tiny if isa == "avx512bf16" and dtype == torch.bfloat16 else 0.0
                    torch.testing.assert_close(target, source.to(dtype), rtol=0, atol=tiny, equal_nan=True)
    finally:
        extension.native.set_cpu_isa("")
