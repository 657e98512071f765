// Global to shared memory: patches of activations, their prologue in place, and weights.
#pragma once

#include "common/mma.cuh"
#include "conv2d/cuda_params.cuh"

namespace idm {
namespace conv {

// A place in the sum. `number` counts chunks from the first of this block.
struct Cursor {
  int source, chunk, tap, number;
};

__device__ __forceinline__ Cursor cursor_at(const Params& p, int chunk) {
  int source = 0;
  while (chunk >= p.sources[source].chunks) chunk -= p.sources[source++].chunks;
  return {source, chunk, 0, 0};
}

__device__ __forceinline__ void advance(const Params& p, Cursor& c) {
  const Source& s = p.sources[c.source];
  if (++c.tap < s.side * s.side) return;
  c.tap = 0;
  ++c.number;
  if (++c.chunk < s.chunks) return;
  c.chunk = 0;
  if (c.source + 1 < p.source_count) ++c.source;
}

// Eight values, fewer at the end of the channels, one by one.
template <class T>
__device__ __forceinline__ uint4 gather(const T* data, int count) {
  T values[kPiece];
#pragma unroll
  for (int i = 0; i < kPiece; ++i) values[i] = i < count ? data[i] : from_float<T>(0.0f);
  uint4 bits;
  memcpy(&bits, values, sizeof bits);
  return bits;
}

template <class T, class TILE, int SIDE, int STRIDE>
struct Loader {
  using PATCH = Patch<TILE, SIDE, STRIDE>;
  static_assert(TILE::kThreads % kPieces == 0, "a thread copies the same piece of every position");

  const Params& p;
  Work work;

  // Pixel of the source at one position of the patch, -1 outside.
  __device__ __forceinline__ int pixel(bool flat, int position) const {
    if (flat) {
      const int row = work.row + position / TILE::kColumns, column = work.column + position % TILE::kColumns;
      return row < p.rows && column < p.columns ? place_of(row, column, p.columns, p.upsample, work.phase) : -1;
    }
    // A phase of parity q starts its windows at i + q - 1.
    const int above = p.upsample ? 1 - work.phase / 2 : SIDE / 2, before = p.upsample ? 1 - work.phase % 2 : SIDE / 2;
    return pixel_of(work.row * STRIDE - above + position / PATCH::kColumns,
                    work.column * STRIDE - before + position % PATCH::kColumns, p.height, p.width);
  }

  __device__ __forceinline__ void patch(const Cursor& c, T* target) const {
    const Source& s = p.sources[c.source];
    const int piece = threadIdx.x % kPieces, channel = c.chunk * kBlockK + piece * kPiece;
    const T* data = static_cast<const T*>(s.data) + offset_of(work.sample, s.pixels, 0, s.channels, 0);
    const int positions = s.flat ? TILE::kM : PATCH::kPositions;
    for (int at = threadIdx.x / kPieces; at < positions; at += TILE::kThreads / kPieces) {
      const int from = pixel(s.flat, at);
      const bool valid = from >= 0 && channel < s.channels;
      const T* source = valid ? data + offset_of(0, 0, from, s.channels, channel) : data;
      T* slot = target + patch_slot(at, piece) * kPiece;
      if (p.wide_in)
        cp_async16(slot, valid ? source : static_cast<const T*>(s.data), valid);
      else
        *reinterpret_cast<uint4*>(slot) = gather(source, valid ? s.channels - channel : 0);
    }
  }

  // silu((v - centre) * gain + offset) of what this thread has copied; what is outside stays 0.
  __device__ __forceinline__ void prologue(const Cursor& c, T* target) const {
    const Source& s = p.sources[c.source];
    if (s.coefficients == nullptr) return;
    const int piece = threadIdx.x % kPieces, channel = c.chunk * kBlockK + piece * kPiece;
    if (channel >= s.channels) return;
    float table[3][kPiece];
#pragma unroll
    for (int r = 0; r < 3; ++r) {
      const float* row = s.coefficients + (work.sample * 3 + r) * s.table + channel;
      if (p.wide_in) {
        const float4 low = reinterpret_cast<const float4*>(row)[0], high = reinterpret_cast<const float4*>(row)[1];
        memcpy(table[r], &low, sizeof low);
        memcpy(table[r] + 4, &high, sizeof high);
      } else {
#pragma unroll
        for (int i = 0; i < kPiece; ++i) table[r][i] = channel + i < s.channels ? row[i] : 0.0f;
      }
    }
    for (int at = threadIdx.x / kPieces; at < PATCH::kPositions; at += TILE::kThreads / kPieces) {
      if (pixel(false, at) < 0) continue;
      uint4* slot = reinterpret_cast<uint4*>(target + patch_slot(at, piece) * kPiece);
      const uint4 raw = *slot;
      uint32_t words[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float2 v = unpack2<T>(words[i]);
        float a = (v.x - table[0][2 * i]) * table[1][2 * i] + table[2][2 * i];
        float b = (v.y - table[0][2 * i + 1]) * table[1][2 * i + 1] + table[2][2 * i + 1];
        if (p.silu) a = silu(a), b = silu(b);
        words[i] = pack2<T>(a, b);
      }
      *slot = make_uint4(words[0], words[1], words[2], words[3]);
    }
  }

  __device__ __forceinline__ void weights(const Cursor& c, T* target) const {
    const Source& s = p.sources[c.source];
    const int piece = threadIdx.x % kPieces, channel = c.chunk * kBlockK + piece * kPiece;
    const T* start = static_cast<const T*>(s.weight);
    const T* data = start + (s.flat ? 0 : work.phase * p.phase_weights) + c.tap * s.tap_stride + channel;
    for (int row = threadIdx.x / kPieces; row < TILE::kN; row += TILE::kThreads / kPieces) {
      const bool valid = work.first_cout + row < p.cout && channel < s.channels;
      const T* source = valid ? data + (work.first_cout + row) * s.weight_row : start;
      T* slot = target + weight_slot(row, piece) * kPiece;
      if (p.wide_in)
        cp_async16(slot, source, valid);
      else
        *reinterpret_cast<uint4*>(slot) = gather(source, valid ? s.channels - channel : 0);
    }
  }
};

}  // namespace conv
}  // namespace idm
