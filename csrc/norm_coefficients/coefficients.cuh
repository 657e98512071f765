// A block turns the moments of whole groups of channels into (centre, gain, offset) in shared memory.
#pragma once

#include "channel_stats/moments.cuh"
#include "norm_coefficients/norm_coefficients.h"

namespace idm {

constexpr int kNormThreads = 256, kNormWarps = kNormThreads / kWarp;

struct StatsPart {
  const float* partials;  // [N, P, 2, C]
  const float* counts;    // [P]
  int64_t pieces, channels;
};

inline StatsPart stats_part(const TensorView& partials, const TensorView& counts) {
  if (!partials) return {};
  return {partials.as<const float>(), counts.as<const float>(), partials.shape[1], partials.shape[3]};
}

struct Parameter {
  const void* data;  // or null
  DType dtype;
  int64_t stride;  // between samples

  __device__ __forceinline__ float at(int64_t n, int64_t c) const {
    const int64_t i = n * stride + c;
    if (dtype == DType::kFloat32) return static_cast<const float*>(data)[i];
    if (dtype == DType::kFloat16) return to_float(static_cast<const __half*>(data)[i]);
    return to_float(static_cast<const __nv_bfloat16*>(data)[i]);
  }
};

struct Affine {
  Parameter weight, bias, scale, shift;
};

inline Affine affine_of(const AffineParams& p) {
  const auto one = [](const TensorView& t, int64_t stride) { return Parameter{t.data, t.dtype, stride}; };
  return {one(p.weight, 0), one(p.bias, 0), one(p.scale, p.scale.stride[0]), one(p.shift, p.shift.stride[0])};
}

// Channels of a tile, in whole groups and whole vectors; `columns` threads are that wide, up to all of a block.
struct GroupTile {
  int channels, width, columns;
  int tiles(int64_t all) const { return static_cast<int>((all + channels - 1) / channels); }
  IDM_HOST_DEVICE size_t shared_floats() const { return 3 * static_cast<size_t>(channels) + 3 * kNormThreads; }
};

// The widest up to `most` channels, or the narrowest that there is.
inline GroupTile group_tile(int64_t channels, int64_t groups, int vector, int64_t most) {
  const int64_t width = channels / groups;
  int64_t unit = width;
  while (unit % vector != 0) unit += width;
  int64_t tile = unit;
  while (tile + unit <= most && tile + unit <= channels) tile += unit;
  int columns = 1;
  while (columns < tile && columns < kNormThreads) columns *= 2;
  return {static_cast<int>(tile), static_cast<int>(width), columns};
}

__device__ __forceinline__ float warp_sum(float x) {
  for (int away = kWarp / 2; away > 0; away /= 2) x += __shfl_xor_sync(kFullMask, x, away);
  return x;
}

// shared: GroupTile::shared_floats(); its first 3 * tile.channels become rows (centre, gain, offset). `pivot(local)` is
// some value near the mean of a group that begins at channel first + local; `moments(local, pivot, slice, slices)` gives
// those of the slice-th share of the pieces of channel first + local, the mean less pivot. All threads must call.
template <class P, class F>
__device__ __forceinline__ void group_coefficients(float* shared, const GroupTile& tile, int64_t channels, int64_t n,
                                                   int64_t first, const Affine& affine, float eps, const P& pivot_of,
                                                   const F& moments) {
  float *centres = shared, *gains = centres + tile.channels, *offsets = gains + tile.channels;
  float *means = offsets + tile.channels, *squares = means + kNormThreads, *counts = squares + kNormThreads;
  const int here = static_cast<int>(min(int64_t{tile.channels}, channels - first));
  const int column = threadIdx.x % tile.columns, slice = threadIdx.x / tile.columns;
  const int slices = kNormThreads / tile.columns;
  for (int base = 0; base < here; base += tile.columns) {
    const int local = base + column;
    Moments mine{0.0f, 0.0f, 0.0f};
    if (local < here) mine = moments(local, pivot_of(local - local % tile.width), slice, slices);
    means[threadIdx.x] = mine.mean;
    squares[threadIdx.x] = mine.m2;
    counts[threadIdx.x] = mine.count;
    __syncthreads();
    if (slice == 0 && local < here) {
      for (int s = 1; s < slices; ++s) {
        const int at = s * tile.columns + column;
        merge(mine, {counts[at], means[at], squares[at]});
      }
      centres[local] = mine.mean;
      gains[local] = mine.m2;
      offsets[local] = mine.count;
    }
    __syncthreads();
  }
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  for (int begin = warp * tile.width; begin < here; begin += kNormWarps * tile.width) {
    const float pivot = pivot_of(begin), count = offsets[begin];
    float sum = 0.0f, m2 = 0.0f;
    for (int i = lane; i < tile.width; i += kWarp) sum += centres[begin + i];
    const float rest = warp_sum(sum) / static_cast<float>(tile.width);
    for (int i = lane; i < tile.width; i += kWarp) {
      const float delta = centres[begin + i] - rest;
      m2 += gains[begin + i] + delta * delta * count;
    }
    const float variance = warp_sum(m2) / (count * static_cast<float>(tile.width));
    const float rstd = 1.0f / sqrtf(variance + eps);
    const float centre = pivot + rest, left_out = (centre - pivot) - rest;  // what the rounded mean misses
    __syncwarp();
    for (int i = lane; i < tile.width; i += kWarp) {
      const int64_t c = first + begin + i;
      float gain = affine.weight.data ? affine.weight.at(n, c) : 1.0f;
      float offset = affine.bias.data ? affine.bias.at(n, c) : 0.0f;
      if (affine.scale.data) {
        const float factor = 1.0f + affine.scale.at(n, c);
        gain *= factor;
        offset = offset * factor + affine.shift.at(n, c);
      }
      gain *= rstd;
      centres[begin + i] = centre;
      gains[begin + i] = gain;
      offsets[begin + i] = offset + left_out * gain;
    }
  }
  __syncthreads();
}

// Channel c of two tensors side by side: its mean in the first piece, and the moments of a share of its pieces.
struct TwoParts {
  StatsPart x, skip;
  int64_t n, first;

  __device__ __forceinline__ const StatsPart& part(int local) const { return first + local < x.channels ? x : skip; }
  __device__ __forceinline__ const float* channel(int local) const {
    const StatsPart& p = part(local);
    const int64_t c = first + local;
    return p.partials + n * p.pieces * 2 * p.channels + (c < x.channels ? c : c - x.channels);
  }
  __device__ __forceinline__ Moments moments(int local, float pivot, int slice, int slices) const {
    const StatsPart& p = part(local);
    const int64_t each = (p.pieces + slices - 1) / slices, begin = min(slice * each, p.pieces);
    return merge_pieces(channel(local), p.counts, p.channels, begin, min(begin + each, p.pieces), pivot);
  }
};

__device__ __forceinline__ void coefficients_of_parts(float* shared, const GroupTile& tile, const TwoParts& parts,
                                                      int64_t channels, const Affine& affine, float eps) {
  group_coefficients(
      shared, tile, channels, parts.n, parts.first, affine, eps, [&](int local) { return *parts.channel(local); },
      [&](int local, float pivot, int slice, int slices) { return parts.moments(local, pivot, slice, slices); });
}

}  // namespace idm
