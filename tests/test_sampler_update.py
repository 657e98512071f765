"""sampler_update and dynamic_threshold together, as a sampling loop uses them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from idm_fast.ops import BackendError, ContractError, dynamic_threshold, sampler_update, use_backend

BACKENDS = ("triton", "cpu", "torch", "reference")
SEEDS = torch.tensor([5, 6])
ROWS = torch.tensor(
    [
        [1.25, -0.75, 0.33, 0.71, 0.0, 0.1, 1.0, 0.0],
        [0.8, -0.6, 0.33, 0.71, -0.2, 0.1, 1.0, 0.0],
        [0.0, 1.0, 0.0, 1.0, 0.0, 0.0, 1.0, 0.0],
    ]
)


@contextmanager
def backend_or_skip(name: str) -> Iterator[None]:
    try:
        with use_backend(name):
            yield
    except BackendError as error:
        pytest.skip(str(error))


def image(*shape: int, seed: int = 0) -> Tensor:
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return noise.contiguous(memory_format=torch.channels_last)


def walk(x: Tensor, counter: Tensor | None, quantile: float | None = None) -> Tensor:
    x, history = x.clone(), torch.full_like(x, math.nan)
    for step in range(len(ROWS)):
        output = (0.5 * x + 1).contiguous(memory_format=torch.channels_last)
        at = step if counter is None else counter
        threshold = None if quantile is None else dynamic_threshold(x, output, ROWS, at, quantile)
        sampler_update(x, output, history, ROWS, at, SEEDS[: len(x)], threshold=threshold)
        if counter is not None:
            counter += 1
    return x


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_counter_walks_as_numbers_do(backend: str) -> None:
    x = image(2, 3, 6, 5)
    with backend_or_skip(backend):
        assert torch.equal(walk(x, torch.zeros((), dtype=torch.int64)), walk(x, None))
        assert torch.equal(walk(x, torch.zeros(1, dtype=torch.int64), 0.9), walk(x, None, 0.9))


@pytest.mark.parametrize("backend", BACKENDS)
def test_batch_equals_singles(backend: str) -> None:
    x = image(2, 3, 6, 5)
    with backend_or_skip(backend):
        batch = walk(x, None, 0.9)
        assert torch.equal(batch[:1], walk(x[:1], None, 0.9))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("factor", [1, 2, 4])
@pytest.mark.parametrize("order", ["x_cond", "cond_x"])
def test_input_is_what_the_network_makes_of_it(backend: str, factor: int, order: str) -> None:
    """UNet.forward concatenates, then unshuffles; the condition's channels stay as they are."""
    x, cond = image(2, 3, 8, 12), image(2, 2, 8, 12, seed=1)
    first = order == "x_cond"

    def as_network(x: Tensor) -> Tensor:
        return F.pixel_unshuffle(torch.cat([x, cond] if first else [cond, x], dim=1), factor)

    stem = as_network(torch.zeros_like(x)).half().contiguous(memory_format=torch.channels_last)
    mine = stem[:, : 3 * factor**2] if first else stem[:, 2 * factor**2 :]
    with backend_or_skip(backend):
        sampler_update(x, x * 0.5, x + 0, ROWS, 1, SEEDS, network_input=mine, unshuffle=factor)
    assert torch.equal(stem, as_network(x).half())


@pytest.mark.parametrize("backend", BACKENDS)
def test_threshold_is_torchs_quantile(backend: str) -> None:
    x, output = 3 * image(2, 3, 9, 7), 3 * image(2, 3, 9, 7, seed=1)
    for q in (0.0, 0.3, 0.5, 0.95, 0.995, 1.0):
        expected = (0.8 * x - 0.6 * output).abs().flatten(1).quantile(q, dim=1).clamp(min=1)
        with backend_or_skip(backend):
            found = dynamic_threshold(x, output, ROWS, 1, q)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_threshold_of_values_that_are_not_finite(backend: str) -> None:
    row = torch.tensor([[0.0, 1.0] + [0.0] * 6])
    output = torch.zeros(4, 1, 1, 5)
    output[1, 0, 0, 2] = -math.inf
    output[2, 0, 0, 1:] = math.inf
    output[3, 0, 0, 4] = -math.nan
    with backend_or_skip(backend):
        found = dynamic_threshold(torch.zeros_like(output), output, row, 0, 0.5)
    assert found[:3].tolist() == [1.0, 1.0, math.inf]
    assert found[3].isnan()


@pytest.mark.parametrize("twice", [False, True])
def test_what_is_written_lies_apart_from_what_is_read(twice: bool) -> None:
    """Also from the small tensors, and also where a call of this kind has been seen."""
    room = torch.zeros(96)
    x, table = room[:16].view(1, 1, 4, 4), room[32:40].view(1, 8)
    output, history, seeds = torch.ones(1, 1, 4, 4), torch.zeros(1, 1, 4, 4), SEEDS[:1]
    if twice:
        sampler_update(x, output, history, table, 0, seeds)
    with pytest.raises(ContractError, match="sampler_update: x must be apart from table = no overlap"):
        sampler_update(x, output, history, room[8:16].view(1, 8), 0, seeds)
    if twice:
        sampler_update(x, output, history, table, 0, seeds, threshold=room[60:61])
    with pytest.raises(ContractError, match="sampler_update: x must be apart from threshold = no overlap"):
        sampler_update(x, output, history, table, 0, seeds, threshold=room[3:4])


@pytest.mark.parametrize("step", [1.0, 0.5])
def test_steps_are_whole_numbers(step: float) -> None:
    x = image(2, 3, 4, 4)
    for _ in range(2):
        with pytest.raises(ContractError, match="sampler_update: step must be a row of table"):
            sampler_update(x, x + 0, x + 0, ROWS, step, SEEDS)  # type: ignore[arg-type]
        with pytest.raises(ContractError, match="dynamic_threshold: step must be a row of table"):
            dynamic_threshold(x, x + 0, ROWS, step, 0.5)  # type: ignore[arg-type]
        sampler_update(x, x + 0, x + 0, ROWS, 1, SEEDS)


@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("elements", [64, 100, 20_000])
def test_history_is_written_whether_it_lies_on_lines_or_not(offset: int, elements: int) -> None:
    """Where it is not read it goes past the caches, if its lines allow."""
    room = torch.full((elements + 2,), math.nan)
    history = room[offset : offset + elements].view(1, 1, 1, elements)
    output = torch.randn(1, 1, 1, elements)
    sampler_update(torch.zeros_like(output), output, history, ROWS[2:], 0, SEEDS[:1])
    assert torch.equal(history, output.clamp(-1, 1))
    assert room.isnan().sum() == 2


def test_many_equal_values() -> None:
    """More than 255 elements a thread of the CUDA kernel, and all order statistics the same."""
    x = torch.full((1, 3, 130, 120), -2.5).contiguous(memory_format=torch.channels_last)
    row = torch.tensor([[1.0, 0.0] + [0.0] * 6])
    for backend in ("cpu", "torch", "reference"):
        with backend_or_skip(backend):
            assert dynamic_threshold(x, torch.zeros_like(x), row, 0, 0.77).tolist() == [2.5]


X = image(2, 3, 4, 4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((X, X, ROWS, 3, 0.9), r"step must be a row of table = 0 <= step < 3, got 3"),
        ((X, X, ROWS, 0, 1.5), r"quantile must be a share = 0 <= quantile <= 1, got 1.5"),
        ((X, X, ROWS, 0, math.nan), r"quantile must be a share"),
        ((X, X[:1], ROWS, 0, 0.9), r"model_output must be of x's shape = \[2, 3, 4, 4\], got \[1, 3, 4, 4\]"),
        ((X.half(), X, ROWS, 0, 0.9), r"x must be of dtype = float32, got float16"),
        ((X, X, ROWS[:, :7], 0, 0.9), r"table must be contiguous = \[T, 8\], got \[3, 7\]"),
        ((X, X, ROWS, torch.zeros(2, dtype=torch.int64), 0.9), r"step must be one element"),
        ((X[:, :, :0], X[:, :, :0], ROWS, 0, 0.9), r"x must be of at least one element a sample"),
        ((X, X, ROWS, 0, 0.9, torch.zeros(3)), r"out must be \[N\] = \[2\], got \[3\]"),
        ((X, X, ROWS, 0, 0.9, torch.zeros(2).double()), r"out must be of dtype = float32, got float64"),
        ((X, X, ROWS, 0, 0.9, torch.zeros(4)[::2]), r"out must be contiguous = stride 1, got stride 2"),
        ((X, X, ROWS, 0, 0.9, X[0, 0, 0, :2]), r"out must be"),
        ((X.clone().requires_grad_(), X, ROWS, 0, 0.9), r"no input must require grad"),
    ],
)
def test_refusals(arguments: tuple[object, ...], message: str) -> None:
    with pytest.raises(ContractError, match=rf"dynamic_threshold: {message}"):
        dynamic_threshold(*arguments)  # type: ignore[arg-type]


def test_native_checks_for_itself() -> None:
    from idm_fast.kernels import extension

    native, view = extension.native, extension.view
    if native is None:
        pytest.skip(str(extension.missing))
    x, output, history, row = X + 0, X + 0, X + 0, ROWS  # kept: a view does not keep its memory
    good = (view(x), view(output), view(history), view(row))
    with pytest.raises(ValueError, match="sampler_update: step must be a row of table"):
        native.sampler_update(*good, 3, None, view(SEEDS), None, None, None, 1, 1)
    with pytest.raises(ValueError, match="sampler_update: unshuffle must divide"):
        native.sampler_update(*good, 0, None, view(SEEDS), view(X + 0), None, None, 3, 1)
    with pytest.raises(ValueError, match="sampler_update: network_input must have dense channels"):
        native.sampler_update(*good, 0, None, view(SEEDS), view((X + 0).contiguous()), None, None, 1, 1)
    with pytest.raises(ValueError, match=r"sampler_update: model_output must be .* or of pixel_unshuffle"):
        native.sampler_update(good[0], view(X[:, :2]), *good[2:], 0, None, view(SEEDS), None, None, None, 2, 1)
    with pytest.raises(ValueError, match="sampler_update: base must have the shape of x"):
        native.sampler_update(*good, 0, None, view(SEEDS), None, None, view(X[:1] + 0), 1, 1)
    with pytest.raises(ValueError, match="sampler_update: counter must be int64"):
        native.sampler_update(*good, 0, view(SEEDS), view(SEEDS), None, None, None, 1, 1)
    with pytest.raises(ValueError, match="must not overlap"):
        native.sampler_update(view(x), view(x), *good[2:], 0, None, view(SEEDS), None, None, None, 1, 1)
    with pytest.raises(ValueError, match="dynamic_threshold: quantile must lie"):
        native.dynamic_threshold(view(x), view(X), view(row), 0, None, 2.0, view(torch.zeros(2)), 1)
