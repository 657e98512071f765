"""The CUDA convolution on the CPU: its index maps, and every tile and split, chosen by hand."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch

from idm_fast.kernels import extension
from idm_fast.kernels.case import Case, verdict
from idm_fast.kernels.conv2d.cases import AWKWARD, exact, shape_of, stats_error
from idm_fast.ops import suite, use_backend

WIDE, MIDDLE, SMALL, SLIM = range(4)


@pytest.fixture(scope="module")
def backend(emulator: ModuleType) -> Iterator[Any]:
    """A copy of kernels/conv2d/cuda.py that got the emulator for the native module."""
    spec = importlib.util.find_spec("idm_fast.kernels.conv2d.cuda")
    assert spec is not None
    assert spec.origin is not None
    copy = importlib.util.spec_from_file_location("conv2d_cuda_on_cpu", spec.origin)
    assert copy is not None
    assert copy.loader is not None
    module = importlib.util.module_from_spec(copy)
    extension.cuda_stand_in = emulator
    try:
        copy.loader.exec_module(module)
    finally:
        extension.cuda_stand_in = None
    return module


def run(backend: Any, case: Case, plan: tuple[int, int], dtype: torch.dtype = torch.bfloat16) -> str | None:
    """What is wrong with the case under a given (tile, splits), or None."""
    inputs = case.inputs(dtype)
    n, c, h, w = shape_of(inputs)
    out = torch.full((n, h, w, c), float("nan"), dtype=dtype).permute(0, 3, 1, 2)
    get = inputs.get
    result = backend.conv2d(
        inputs["x"], inputs["weight"], get("bias"), inputs["stride"], inputs["upsample"], get("skip"),
        get("coefficients"), inputs["silu"], get("shortcut"), get("shortcut_skip"), get("shortcut_weight"),
        get("time_shift"), get("residual"), inputs["with_stats"], out, None, plan=plan,
    )  # fmt: skip
    found = {"out": out}
    if inputs["with_stats"]:
        found["stats"] = stats_error(*result)
    with use_backend("torch"):
        return verdict(found, exact(inputs), suite("conv2d").call(inputs))


BY_NAME = {case.name: case for case in AWKWARD}
PLANS = [
    *(("all_at_once", tile, splits) for tile in (WIDE, MIDDLE, SMALL, SLIM) for splits in (1, 2)),
    *(("odd", tile, 1) for tile in (WIDE, MIDDLE, SLIM)),
    *(("upsample_all", tile, splits) for tile in (WIDE, MIDDLE) for splits in (1, 4)),
    *(("pointwise_all", tile, splits) for tile in (WIDE, MIDDLE) for splits in (1, 2)),
    ("stride_odd", SMALL, 4), ("long_sum", SMALL, 10), ("far_stats", SLIM, 1), ("stats", WIDE, 1),
]  # fmt: skip


@pytest.mark.parametrize(("name", "tile", "splits"), PLANS)
def test_every_tile_and_split(backend: Any, name: str, tile: int, splits: int) -> None:
    assert run(backend, BY_NAME[name], (tile, splits)) is None


def test_a_plan_leaves_no_split_without_work(emulator: ModuleType) -> None:
    for chunks in range(1, 70):
        for side in (1, 2, 3):
            tile, splits = emulator.conv2d_cuda_plan(1, 1, 8, 8, 512, chunks, side, 1)
            assert 1 <= splits <= chunks
            assert -(-chunks // -(-chunks // splits)) == splits
            assert emulator.conv2d_cuda_pieces(tile, 4, 9, 8) == 4 * 2


@pytest.mark.parametrize(
    ("case", "plan", "message"),
    [
        ("odd", (4, 1), "tile must be 0 .. 3"),
        ("stride", (WIDE, 1), "tile must be 2 for stride 2"),
        ("pointwise", (SLIM, 1), "tile 3 must be used for 3x3 weights"),
        ("all_at_once", (SMALL, 50), "splits must be 1 .. chunks of the sum"),
        ("long_sum", (SMALL, 6), "splits must leave none without work"),
    ],
)
def test_impossible_plans_are_refused(backend: Any, case: str, plan: tuple[int, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run(backend, BY_NAME[case], plan)


def test_offsets_beyond_32_bits(emulator: ModuleType) -> None:
    """sample, pixels, pixel, channels, channel -> element, with more than 2^31 elements before it."""
    for numbers in [(70, 512 * 512, 512 * 512 - 1, 128, 127), (0, 2**30, 2**30 - 1, 9, 8), (3, 2**31 - 1, 5, 2048, 7)]:
        n, pixels, pixel, channels, channel = numbers
        expected = (n * pixels + pixel) * channels + channel
        assert expected > 2**31
        assert emulator.conv2d_cuda_map("offset", numbers) == expected


def test_shared_memory_meets_every_bank(emulator: ModuleType) -> None:
    """Eight rows of one ldmatrix, and eight neighbouring copies, lie in eight different groups of four banks."""

    def at(name: str, row: int, piece: int) -> int:
        return int(emulator.conv2d_cuda_map(name, (row, piece, 0, 0, 0)))

    columns = [[emulator.conv2d_cuda_map("column", (j, n, 0, 0, 0)) for n in range(8)] for j in range(4)]
    assert sorted(column for row in columns for column in row) == list(range(32))
    for piece in range(4):
        for first in range(50):
            assert len({at("patch", first + row, piece) % 8 for row in range(8)}) == 8
        for j in range(4):
            assert len({at("weight", column, piece) % 8 for column in columns[j]}) == 8
    for name in ("patch", "weight"):
        slots = [at(name, row, piece) for row in range(180) for piece in range(4)]
        assert sorted(slots) == list(range(720)), "every slot is used once"
        for first in range(0, 720, 8):
            assert len({slot % 8 for slot in slots[first : first + 8]}) == 8


def test_lanes_hold_neighbouring_channels(emulator: ModuleType) -> None:
    """Lane t of a row holds columns 2t, 2t + 1 of each fragment: together the channels 8t .. 8t + 7."""
    for t in range(4):
        held = [emulator.conv2d_cuda_map("column", (j, 2 * t + e, 0, 0, 0)) for j in range(4) for e in range(2)]
        assert held == list(range(8 * t, 8 * t + 8))


def test_phases_fill_the_result_once(emulator: ModuleType) -> None:
    places = [
        emulator.conv2d_cuda_map("place", (row, column, 5, 1, phase))
        for phase in range(4)
        for row in range(3)
        for column in range(5)
    ]
    assert sorted(places) == list(range(60))
    assert emulator.conv2d_cuda_map("place", (1, 2, 5, 1, 3)) == 3 * 10 + 5
    assert emulator.conv2d_cuda_map("pixel", (-1, 0, 4, 4, 0)) == -1
    assert emulator.conv2d_cuda_map("pixel", (3, 2, 4, 4, 0)) == 14
