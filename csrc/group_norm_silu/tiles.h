// Which elements a thread of group_norm_silu.cu takes. For both sides: tests ask it about tensors of more than 2^31
// elements, which no test could allocate.
#pragma once

#include <cstdint>
#include <vector>

#include "common/host_device.h"

namespace idm {

// Blocks are cut along the rows (positions) of a sample; `samples * row_blocks` of them, times tiles of channels.
struct RowTiles {
  int64_t rows, channels1, channels2;  // of a sample; channels2 is 0 without a skip tensor
  int64_t row_blocks, block_rows;
  int tile_channels;

  IDM_HOST_DEVICE int64_t channels() const { return channels1 + channels2; }
  IDM_HOST_DEVICE int64_t sample(int64_t block) const { return block / row_blocks; }
  IDM_HOST_DEVICE int64_t first_row(int64_t block) const { return block % row_blocks * block_rows; }
  IDM_HOST_DEVICE int64_t last_row(int64_t block) const {
    const int64_t last = first_row(block) + block_rows;
    return last < rows ? last : rows;
  }
  IDM_HOST_DEVICE int64_t first_channel(int64_t tile) const { return tile * tile_channels; }
  IDM_HOST_DEVICE bool in_x(int64_t channel) const { return channel < channels1; }
  // Offsets in elements, of x or skip (whichever holds the channel) and of out.
  IDM_HOST_DEVICE int64_t input_offset(int64_t sample, int64_t row, int64_t channel) const {
    return in_x(channel) ? (sample * rows + row) * channels1 + channel
                         : (sample * rows + row) * channels2 + (channel - channels1);
  }
  IDM_HOST_DEVICE int64_t input_stride(int64_t channel) const { return in_x(channel) ? channels1 : channels2; }
  IDM_HOST_DEVICE int64_t output_offset(int64_t sample, int64_t row, int64_t channel) const {
    return (sample * rows + row) * channels() + channel;
  }
};

// `wanted` blocks in all where the rows allow it; a block takes `step` rows at a time.
inline RowTiles row_tiles(int64_t samples, int64_t rows, int64_t channels1, int64_t channels2, int tile_channels,
                          int64_t step, int64_t wanted) {
  RowTiles t{rows, channels1, channels2, 1, rows, tile_channels};
  const int64_t others = samples * ((t.channels() + tile_channels - 1) / tile_channels);
  const int64_t most = (rows + step - 1) / step;
  int64_t blocks = (wanted + others - 1) / others;
  blocks = blocks < 1 ? 1 : blocks > most ? most : blocks;
  t.block_rows = ((rows + blocks - 1) / blocks + step - 1) / step * step;
  t.row_blocks = (rows + t.block_rows - 1) / t.block_rows;
  return t;
}

// For tests of tensors that are too large to allocate: how the rows of a sample are cut for `wanted` blocks that take
// `step` rows at a time, and what the block with that number meets first: {row_blocks, block_rows, sample, first row,
// last row, offset in x or skip, offset in out} of its first row and the given channel.
inline std::vector<int64_t> group_norm_silu_cuda_map(int64_t samples, int64_t rows, int64_t channels1, int64_t channels2,
                                              int tile_channels, int64_t step, int64_t wanted, int64_t block,
                                              int64_t channel) {
  const RowTiles t = row_tiles(samples, rows, channels1, channels2, tile_channels, step, wanted);
  const int64_t n = t.sample(block), row = t.first_row(block);
  return {t.row_blocks,      t.block_rows, n, row, t.last_row(block), t.input_offset(n, row, channel),
          t.output_offset(n, row, channel)};
}

}  // namespace idm
