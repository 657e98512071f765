// Mean and sum of squared differences (M2) of some values, merged by Chan's formula; and 16-byte loads and stores.
#pragma once

#include "common/cuda.h"

namespace idm {

struct Moments {
  float count, mean, m2;
};

// What merging counts (a, b) needs, the same for every channel. Nothing is merged with nothing.
struct MergeShare {
  float total, share, cross;
  __device__ __forceinline__ MergeShare(float a, float b) : total(a + b), share(b > 0.0f ? b / total : 0.0f), cross(a * share) {}
  __device__ __forceinline__ void operator()(float& mean, float& m2, float other_mean, float other_m2) const {
    const float delta = other_mean - mean;
    mean += delta * share;
    m2 += other_m2 + delta * delta * cross;
  }
};

__device__ __forceinline__ void merge(Moments& into, const Moments& other) {
  const MergeShare share(into.count, other.count);
  share(into.mean, into.m2, other.mean, other.m2);
  into.count = share.total;
}

// Pieces [first, last) of one channel; `partials` points to it in [P][2][stride]. The mean is given less `pivot`: what is
// merged are small numbers, where the mean itself is far from zero. Eight pieces are loaded together and merged around
// one of their own means, so that there is one division for eight.
__device__ __forceinline__ Moments merge_pieces(const float* partials, const float* counts, int64_t stride, int64_t first,
                                                int64_t last, float pivot) {
  constexpr int kTogether = 8;
  Moments all{0.0f, 0.0f, 0.0f};
  for (int64_t p = first; p < last; p += kTogether) {
    float count[kTogether], mean[kTogether], m2 = 0.0f;
#pragma unroll
    for (int i = 0; i < kTogether; ++i) {
      const bool there = p + i < last;
      const float* piece = partials + (there ? p + i : p) * 2 * stride;
      count[i] = there ? counts[p + i] : 0.0f;
      mean[i] = piece[0];
      m2 += there ? piece[stride] : 0.0f;
    }
    float seen = 0.0f, sum = 0.0f;
#pragma unroll
    for (int i = 0; i < kTogether; ++i) {
      seen += count[i];
      sum += (mean[i] - mean[0]) * count[i];
    }
    const float rest = sum / seen;
#pragma unroll
    for (int i = 0; i < kTogether; ++i) {
      const float delta = (mean[i] - mean[0]) - rest;
      m2 += delta * delta * count[i];
    }
    merge(all, {seen, (mean[0] - pivot) + rest, m2});
  }
  return all;
}

// V neighbours of type T: 16 bytes, or one value where the channels do not allow more.
template <class T, int V>
struct Vector {
  static_assert(V == 1 || V * sizeof(T) == 16, "a vector is one value or 16 bytes");
  T lanes[V];
  __device__ __forceinline__ void load(const T* p) {
    if constexpr (V == 1) {
      lanes[0] = *p;
    } else {
      const uint4 raw = *reinterpret_cast<const uint4*>(p);
      memcpy(lanes, &raw, sizeof raw);
    }
  }
  __device__ __forceinline__ void store(T* p) const {
    if constexpr (V == 1) {
      *p = lanes[0];
    } else {
      uint4 raw;
      memcpy(&raw, lanes, sizeof raw);
      *reinterpret_cast<uint4*>(p) = raw;
    }
  }
};

template <class T>
constexpr int kVector = 16 / static_cast<int>(sizeof(T));

// Statistics of V channels over the rows first, first + step, ... below last. Differences from the first value: where
// that one is far off, its own square difference is part of M2 and larger than what is lost.
template <class T, int V>
__device__ __forceinline__ float row_moments(const T* x, int64_t stride, int64_t first, int64_t last, int64_t step,
                                             const float (&pivot)[V], float (&mean)[V], float (&m2)[V]) {
  constexpr int kTogether = 4;  // loads under way
  float shift[V] = {}, sum[V] = {}, squares[V] = {}, count = 0.0f;
  for (int64_t r = first; r < last; r += kTogether * step) {
    Vector<T, V> values[kTogether];
#pragma unroll
    for (int j = 0; j < kTogether; ++j) values[j].load(x + (r + j * step < last ? r + j * step : r) * stride);
    if (r == first)
#pragma unroll
      for (int k = 0; k < V; ++k) shift[k] = to_float(values[0].lanes[k]);
#pragma unroll
    for (int j = 0; j < kTogether; ++j) {
      if (r + j * step >= last) continue;
      count += 1.0f;
#pragma unroll
      for (int k = 0; k < V; ++k) {
        const float d = to_float(values[j].lanes[k]) - shift[k];
        sum[k] += d;
        squares[k] += d * d;
      }
    }
  }
  const float each = count > 0.0f ? 1.0f / count : 0.0f;
#pragma unroll
  for (int k = 0; k < V; ++k) {
    mean[k] = count > 0.0f ? (shift[k] - pivot[k]) + sum[k] * each : 0.0f;
    const float rest = squares[k] - sum[k] * (sum[k] * each);
    m2[k] = rest < 0.0f ? 0.0f : rest;  // a NaN stays one
  }
  return count;
}

}  // namespace idm
