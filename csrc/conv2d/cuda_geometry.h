// Where things lie in the CUDA convolution: index maps of tiles, patches, shared memory and tensors. Compiled for both
// sides; tests/test_conv2d_cuda.py checks them on the CPU.
#pragma once

#include <cstdint>

#include "common/host_device.h"

namespace idm {
namespace conv {

constexpr int kBlockK = 32;                // channels of one step of the sum: 64 bytes a position or weight row
constexpr int kPiece = 8;                  // 16-bit values of 16 bytes: what one thread copies at a time
constexpr int kPieces = kBlockK / kPiece;  // of a position
constexpr int kWarpColumns = 32;           // output channels of one warp

// A block makes ROWS x COLUMNS positions of one phase of one sample, N output channels, by WARPS_M x WARPS_N warps.
template <int ROWS, int COLUMNS, int N, int WARPS_M>
struct Tile {
  static constexpr int kRows = ROWS, kColumns = COLUMNS, kM = ROWS * COLUMNS, kN = N;
  static constexpr int kWarpsM = WARPS_M, kWarpsN = N / kWarpColumns, kThreads = 32 * kWarpsM * kWarpsN;
  static constexpr int kFrags = kM / kWarpsM / 16;  // of 16 positions, in a warp
  static_assert(kM % (16 * kWarpsM) == 0 && N % kWarpColumns == 0, "warps share a tile evenly");
};

// The input positions that a tile's SIDE x SIDE windows see.
template <class TILE, int SIDE, int STRIDE>
struct Patch {
  static constexpr int kRows = (TILE::kRows - 1) * STRIDE + SIDE, kColumns = (TILE::kColumns - 1) * STRIDE + SIDE;
  static constexpr int kPositions = kRows * kColumns;
  // First position of the window of position m of the tile; tap (i, j) is i * kColumns + j further.
  IDM_HOST_DEVICE static int window(int m) {
    return m / TILE::kColumns * STRIDE * kColumns + m % TILE::kColumns * STRIDE;
  }
};

// Slots of 16 bytes in shared memory. ldmatrix reads 8 rows of one piece at a time: consecutive positions of a patch, or
// the weight rows {0, 1, 8, 9, 16, 17, 24, 25} + 2 j (see column_of). The exclusive or spreads each over all 32 banks.
IDM_HOST_DEVICE int patch_slot(int position, int piece) { return position * kPieces + (piece ^ (position >> 1 & 3)); }
IDM_HOST_DEVICE int weight_slot(int row, int piece) { return row * kPieces + (piece ^ (row >> 3 & 3)); }

// Output channel, within a warp's 32, of column n (0 .. 7) of its mma fragment j (0 .. 3). In this order a lane's eight
// values of one position are eight neighbours: one access of 16 bytes.
IDM_HOST_DEVICE int column_of(int j, int n) { return (n >> 1) * 8 + j * 2 + (n & 1); }

// Row-major number of a pixel, or -1 outside the image.
IDM_HOST_DEVICE int pixel_of(int row, int column, int height, int width) {
  return row >= 0 && row < height && column >= 0 && column < width ? row * width + column : -1;
}

// Pixel of the result at position (row, column) of phase's grid with `columns` columns; phase is 0 without upsampling.
IDM_HOST_DEVICE int place_of(int row, int column, int columns, bool upsample, int phase) {
  return upsample ? (2 * row + phase / 2) * (2 * columns) + 2 * column + phase % 2 : row * columns + column;
}

// Elements from the start of an NHWC tensor.
IDM_HOST_DEVICE int64_t offset_of(int64_t sample, int64_t pixels, int64_t pixel, int64_t channels, int64_t channel) {
  return (sample * pixels + pixel) * channels + channel;
}

}  // namespace conv
}  // namespace idm
