// After the sum: what is added, the store, and the statistics of what was stored.
#pragma once

#include "conv2d/cuda_params.cuh"

namespace idm {
namespace conv {

__device__ __forceinline__ float sum_of_rows(float v) {  // over the lanes of a warp with the same lane % 4
  for (int lanes = 4; lanes < kWarp; lanes *= 2) v += __shfl_xor_sync(kFullMask, v, lanes);
  return v;
}

// Eight neighbouring values of one position, as floats.
template <class T>
__device__ __forceinline__ void read8(const T* data, int count, bool wide, float (&v)[kPiece]) {
  if (wide) {
    const uint4 bits = *reinterpret_cast<const uint4*>(data);
    const uint32_t words[4] = {bits.x, bits.y, bits.z, bits.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float2 pair = unpack2<T>(words[i]);
      v[2 * i] = pair.x;
      v[2 * i + 1] = pair.y;
    }
  } else {
#pragma unroll
    for (int i = 0; i < kPiece; ++i) v[i] = i < count ? to_float(data[i]) : 0.0f;
  }
}

// Stores them and leaves in v what was stored.
template <class T>
__device__ __forceinline__ void write8(T* data, int count, bool wide, float (&v)[kPiece]) {
  if (wide) {
    uint32_t words[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      words[i] = pack2<T>(v[2 * i], v[2 * i + 1]);
      const float2 pair = unpack2<T>(words[i]);
      v[2 * i] = pair.x;
      v[2 * i + 1] = pair.y;
    }
    *reinterpret_cast<uint4*>(data) = make_uint4(words[0], words[1], words[2], words[3]);
  } else {
#pragma unroll
    for (int i = 0; i < kPiece; ++i) {
      const T value = from_float<T>(v[i]);
      if (i < count) data[i] = value;
      v[i] = to_float(value);
    }
  }
}

// acc[f][j][2 h + e]: position (8 h + lane / 4) of fragment f, channel 8 (lane % 4) + 2 j + e of the warp's 32.
// scratch: floats of shared memory, (2 * kWarpsM + 1) * kN, free to use.
template <class T, class TILE>
__device__ __forceinline__ void finish(const Params& p, const Work& work, float (&acc)[TILE::kFrags][4][4],
                                       float* scratch) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int warp_m = warp % TILE::kWarpsM, warp_n = warp / TILE::kWarpsM;
  const int column = warp_n * kWarpColumns + lane % 4 * kPiece, c = work.first_cout + column;
  const int count = min(p.cout - c, kPiece);  // may be below 1
  const bool wide = p.wide_out && count > 0;
  const int64_t places = int64_t{p.rows} * p.columns * p.phases;
  const bool split = p.workspace != nullptr;

  float base[kPiece];
#pragma unroll
  for (int i = 0; i < kPiece; ++i) {
    base[i] = 0.0f;
    if (split || i >= count) continue;
    if (p.bias != nullptr) base[i] = parameter<T>(p.bias, p.bias_float, c + i);
    if (p.time_shift != nullptr) base[i] += parameter<T>(p.time_shift, p.time_float, work.sample * p.time_stride + c + i);
  }

  bool inside[TILE::kFrags][2];
#pragma unroll
  for (int f = 0; f < TILE::kFrags; ++f)
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int m = (warp_m * TILE::kFrags + f) * 16 + h * 8 + lane / 4;
      const int row = work.row + m / TILE::kColumns, col = work.column + m % TILE::kColumns;
      inside[f][h] = row < p.rows && col < p.columns;
      if (!inside[f][h] || count < 1) continue;
      const int place = place_of(row, col, p.columns, p.upsample, work.phase);
      const int64_t at = offset_of(work.sample, places, place, p.cout, c);
      float v[kPiece];
#pragma unroll
      for (int i = 0; i < kPiece; ++i) v[i] = acc[f][i / 2][2 * h + i % 2] + base[i];
      if (split) {
        float* part = p.workspace + blockIdx.z * (p.samples * places * p.cout) + at;
        if (wide) {
          reinterpret_cast<float4*>(part)[0] = make_float4(v[0], v[1], v[2], v[3]);
          reinterpret_cast<float4*>(part)[1] = make_float4(v[4], v[5], v[6], v[7]);
        } else {
#pragma unroll
          for (int i = 0; i < kPiece; ++i)
            if (i < count) part[i] = v[i];
        }
        continue;
      }
      if (p.residual != nullptr) {
        float r[kPiece];
        read8(static_cast<const T*>(p.residual) + at, count, wide, r);
#pragma unroll
        for (int i = 0; i < kPiece; ++i) v[i] += r[i];
      }
      write8(static_cast<T*>(p.out) + at, count, wide, v);
#pragma unroll
      for (int i = 0; i < kPiece; ++i) acc[f][i / 2][2 * h + i % 2] = v[i];
    }
  if (split || p.partials == nullptr) return;

  // A first mean of the tile, then what it missed: the second sums are of small numbers.
  const int seen = min(p.rows - work.row, TILE::kRows) * min(p.columns - work.column, TILE::kColumns);
  const float share = 1.0f / static_cast<float>(seen);
  float rough[kPiece];
#pragma unroll
  for (int i = 0; i < kPiece; ++i) {
    float sum = 0.0f;
#pragma unroll
    for (int f = 0; f < TILE::kFrags; ++f)
#pragma unroll
      for (int h = 0; h < 2; ++h)
        if (inside[f][h]) sum += acc[f][i / 2][2 * h + i % 2];
    sum = sum_of_rows(sum);
    if (lane < 4) scratch[warp_m * TILE::kN + column + i] = sum;
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kPiece; ++i) {
    rough[i] = 0.0f;
    for (int w = 0; w < TILE::kWarpsM; ++w) rough[i] += scratch[w * TILE::kN + column + i];
    rough[i] *= share;
  }
  __syncthreads();
  float* means = scratch + 2 * TILE::kWarpsM * TILE::kN;
  if (warp_m == 0 && lane < 4)
#pragma unroll
    for (int i = 0; i < kPiece; ++i) means[column + i] = rough[i];
#pragma unroll
  for (int i = 0; i < kPiece; ++i) {
    float rest = 0.0f, squares = 0.0f;
#pragma unroll
    for (int f = 0; f < TILE::kFrags; ++f)
#pragma unroll
      for (int h = 0; h < 2; ++h)
        if (inside[f][h]) {
          const float d = acc[f][i / 2][2 * h + i % 2] - rough[i];
          rest += d;
          squares += d * d;
        }
    rest = sum_of_rows(rest);
    squares = sum_of_rows(squares);
    if (lane < 4) {
      scratch[warp_m * TILE::kN + column + i] = rest;
      scratch[(TILE::kWarpsM + warp_m) * TILE::kN + column + i] = squares;
    }
  }
  __syncthreads();
  const int pieces = p.phases * p.tile_rows * p.tile_columns;
  for (int i = threadIdx.x; i < TILE::kN && work.first_cout + i < p.cout; i += TILE::kThreads) {
    float rest = 0.0f, squares = 0.0f;
    for (int w = 0; w < TILE::kWarpsM; ++w) {
      rest += scratch[w * TILE::kN + i];
      squares += scratch[(TILE::kWarpsM + w) * TILE::kN + i];
    }
    float* target = p.partials + (work.sample * pieces + work.piece) * 2 * p.cout + work.first_cout + i;
    target[0] = means[i] + rest * share;
    target[p.cout] = squares - rest * rest * share;
  }
  if (work.sample == 0 && work.first_cout == 0 && threadIdx.x == 0) p.counts[work.piece] = static_cast<float>(seen);
}

}  // namespace conv
}  // namespace idm
