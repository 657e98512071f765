// What the CUDA kernels of conv2d are told.
#pragma once

#include "common/cuda.h"
#include "conv2d/cuda_geometry.h"

#if defined(__CUDACC__)
#define IDM_GRID_CONSTANT __grid_constant__
#else
#define IDM_GRID_CONSTANT
#endif

namespace idm {
namespace conv {

// One tensor of the sum: x, skip, shortcut or shortcut_skip.
struct Source {
  const void* data;           // [N][pixels][channels]
  const void* weight;         // at its first channel: [Cout][weight_row], taps of tap_stride
  const float* coefficients;  // at its first channel: [N][3][table], or null
  int64_t pixels, weight_row, tap_stride, table;
  int channels, chunks;  // chunks of kBlockK channels
  int side;              // taps side x side; 1 with `flat`
  bool flat;             // a shortcut: raw values at the places of the result
};

struct Params {
  Source sources[4];
  int source_count;
  const void *bias, *time_shift, *residual;
  bool bias_float, time_float;  // of float32, not of x's dtype
  int64_t time_stride, phase_weights;  // phase_weights: elements from one phase's weights to the next
  void* out;
  float *partials, *counts, *workspace;  // workspace [splits][N][Ho * Wo][Cout], or null: no split
  int samples, height, width;            // of x
  int rows, columns;                     // positions of one phase
  int cout, phases, tile_rows, tile_columns, column_tiles;
  int chunks, split_chunks;  // of the whole sum, and those of one split
  bool upsample, silu;
  bool wide_in, wide_out;  // reads, writes in aligned pieces of 16 bytes
};

// Which tile a block makes.
struct Work {
  int64_t sample;
  int phase, row, column, first_cout, piece;  // row, column: first position in the phase's grid
};

template <class TILE>
__device__ __forceinline__ Work work_of(const Params& p) {
  int id = blockIdx.x;  // one axis for everything, because the others of a grid end at 65535
  Work w;
  w.first_cout = id % p.column_tiles * TILE::kN;
  id /= p.column_tiles;
  const int tiles = p.tile_rows * p.tile_columns, tile = id % tiles;
  id /= tiles;
  w.row = tile / p.tile_columns * TILE::kRows;
  w.column = tile % p.tile_columns * TILE::kColumns;
  w.phase = id % p.phases;
  w.piece = w.phase * tiles + tile;
  w.sample = id / p.phases;
  return w;
}

template <class T>
__device__ __forceinline__ float parameter(const void* data, bool is_float, int64_t index) {
  return is_float ? static_cast<const float*>(data)[index] : to_float(static_cast<const T*>(data)[index]);
}

__device__ __forceinline__ float silu(float v) { return __fdividef(v, 1.0f + __expf(-v)); }

}  // namespace conv
}  // namespace idm
