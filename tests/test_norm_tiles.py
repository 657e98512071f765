"""Where the CUDA kernels of group_norm_silu read and write in tensors that no test could allocate."""

from __future__ import annotations

from types import ModuleType

import pytest


@pytest.mark.parametrize(
    ("samples", "rows", "channels1", "channels2", "tile"),
    [
        (1, 2**25 + 3, 96, 0, 48),  # 3.2e9 elements
        (3, 2**24 + 1, 64, 40, 8),  # two tensors; 3.2e9 and 2.0e9 elements
        (70_000, 1024, 32, 32, 32),  # more than 65535 samples
        (2, 2**31 + 5, 8, 8, 16),  # more than 2^31 rows
    ],
)
def test_offsets_beyond_32_bits(
    emulator: ModuleType, samples: int, rows: int, channels1: int, channels2: int, tile: int
) -> None:
    step, wanted, channels = 32, 264, channels1 + channels2
    shape = (samples, rows, channels1, channels2, tile, step, wanted)
    row_blocks, block_rows, *_ = emulator.group_norm_silu_cuda_map(*shape, 0, 0)
    assert (row_blocks - 1) * block_rows < rows <= row_blocks * block_rows
    assert block_rows % step == 0
    assert samples * row_blocks < 2**31
    last = samples * row_blocks - 1
    for block in {0, 1 % (last + 1), last // 2, last}:
        for channel in {0, channels1 - 1, channels1 % channels, channels - 1}:
            found = emulator.group_norm_silu_cuda_map(*shape, block, channel)
            sample, first = block // row_blocks, block % row_blocks * block_rows
            at = sample * rows + first
            source = at * channels1 + channel if channel < channels1 else at * channels2 + channel - channels1
            assert found[2:] == [sample, first, min(first + block_rows, rows), source, at * channels + channel]
    assert found[6] <= samples * rows * channels - 1


def test_a_batch_of_one_fills_the_device(emulator: ModuleType) -> None:
    for pixels, channels in ((64, 64), (128, 128), (256, 128), (512, 32)):
        row_blocks, *_ = emulator.group_norm_silu_cuda_map(1, pixels**2, channels, 0, min(channels, 64), 32, 264, 0, 0)
        assert row_blocks * -(-channels // 64) >= 126, (pixels, channels)
