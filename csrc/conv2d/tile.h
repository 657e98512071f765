// The inner product of a convolution and its epilogue, for any kind of word (see conv2d.h). Included by *_isa.cpp only.
#pragma once

#include "common/simd.h"
#include "conv2d/conv2d.h"

namespace idm {
namespace IDM_ISA {

#if defined(__AVX512F__)
constexpr int kStripVectors = 4;  // 6 x 4 sums, 4 vectors of weights and a broadcast in 32 registers
#else
constexpr int kStripVectors = 2;  // 6 x 2 sums, 2 and 1 in 16
#endif
constexpr int kGroup = 6;  // positions
constexpr int64_t kStrip = kStripVectors * kWidth;

// A float32 sum of thousands of products would lose digits that a float32 result shows: every kChunk steps or so the
// sums are added to those before and begin anew. 0: never; integers are exact, and 16-bit results do not show it.
struct FloatDot {
  typedef vf Sum;
  static constexpr int64_t kChunk = 64;
  static vf start(const ConvTile&, int) { return vf{}; }
  static vf weights(const char* p) { return load(reinterpret_cast<const float*>(p)); }
  static vf broadcast(const char* p) {
    float word;
    std::memcpy(&word, p, 4);
    return splat(word);
  }
  static vf dot(vf sum, vf a, vf b) { return sum + a * b; }
  static vf finish(const ConvTile&, vf sum, int) { return sum; }
};

// P positions by V vectors of output channels: sums[p][v]. Few vectors would leave the multipliers waiting for their
// own results, so that each sum then runs in several chains by turns.
template <class Dot, int P, int V>
__attribute__((noinline)) void sums_of(const ConvTile& tile, const char* const (*position)[2], typename Dot::Sum* out) {
  constexpr int kChains = kStripVectors / V;
  constexpr int64_t kStepBytes = V * kWidth * 4;
  typename Dot::Sum sum[kChains][P][V];
#pragma GCC unroll 8
  for (int chain = 0; chain < kChains; ++chain)
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) {
      const typename Dot::Sum first = chain == 0 ? Dot::start(tile, v) : typename Dot::Sum{};
#pragma GCC unroll 8
      for (int p = 0; p < P; ++p) sum[chain][p][v] = first;
    }
  bool begun = false;
  int64_t run = 0;
  const auto add_up = [&]() __attribute__((always_inline)) {
#pragma GCC unroll 8
    for (int p = 0; p < P; ++p)
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) {
        typename Dot::Sum total = sum[0][p][v];
#pragma GCC unroll 8
        for (int chain = 1; chain < kChains; ++chain) total += sum[chain][p][v];
        out[p * V + v] = begun ? out[p * V + v] + total : total;
#pragma GCC unroll 8
        for (int chain = 0; chain < kChains; ++chain) sum[chain][p][v] = typename Dot::Sum{};
      }
    begun = true;
    run = 0;
  };
  for (int s = 0; s < tile.segments; ++s) {
    const ConvSegment& segment = tile.segment[s];
    const char* weights = segment.weights;
    for (int64_t tap = 0; tap < segment.taps; ++tap) {
      const char* words[P];
#pragma GCC unroll 8
      for (int p = 0; p < P; ++p) words[p] = position[p][s] + segment.shifts[tap];
      const int64_t chunk = Dot::kChunk ? Dot::kChunk : segment.steps;
      const auto take = [&](int64_t step, auto& chain) __attribute__((always_inline)) {
        decltype(Dot::weights(weights)) w[V];
#pragma GCC unroll 8
        for (int v = 0; v < V; ++v) w[v] = Dot::weights(weights + v * kWidth * 4);
#pragma GCC unroll 8
        for (int p = 0; p < P; ++p) {
          const auto word = Dot::broadcast(words[p] + step * 4);
#pragma GCC unroll 8
          for (int v = 0; v < V; ++v) chain[p][v] = Dot::dot(chain[p][v], word, w[v]);
        }
        weights += kStepBytes;
      };
      for (int64_t step = 0; step < segment.steps;) {
        const int64_t first = step, end = segment.steps - first < chunk ? segment.steps : first + chunk;
        for (; step + kChains <= end; step += kChains)
#pragma GCC unroll 8
          for (int chain = 0; chain < kChains; ++chain) take(step + chain, sum[chain]);
        if (kChains > 1)
          for (; step < end; ++step) take(step, sum[0]);
        if (Dot::kChunk && (run += step - first) >= Dot::kChunk) add_up();
      }
    }
  }
  add_up();
}

template <class Dot, int V>
void sums(const ConvTile& tile, int count, const char* const (*position)[2], typename Dot::Sum* out) {
  switch (count) {
    case 1: return sums_of<Dot, 1, V>(tile, position, out);
    case 2: return sums_of<Dot, 2, V>(tile, position, out);
    case 3: return sums_of<Dot, 3, V>(tile, position, out);
    case 4: return sums_of<Dot, 4, V>(tile, position, out);
    case 5: return sums_of<Dot, 5, V>(tile, position, out);
    default: return sums_of<Dot, 6, V>(tile, position, out);
  }
}

// Mean and sum of squared differences of what was stored, for K vectors of channels. The first value of each channel
// shifts the first pass, so that a far mean costs no digits; what is then left of the mean is taken out of the squares.
template <class T, int K>
void vector_stats(const ConvTile& tile, int64_t c, int lanes) {
  const auto read = [&](int64_t row, int64_t col, int k) {
    const T* p = reinterpret_cast<const T*>(tile.out + row * tile.out_row + col * tile.out_col) + c + k * kWidth;
    return lanes == kWidth ? load(p) : load_partial(p, lanes);
  };
  const float count = static_cast<float>(tile.rows * tile.cols);
  vf mean[K], total[K] = {}, squares[K] = {}, rest[K] = {};
  for (int k = 0; k < K; ++k) mean[k] = read(0, 0, k);
  for (int64_t row = 0; row < tile.rows; ++row) {
    vf line[K] = {};
    for (int64_t col = 0; col < tile.cols; ++col)
      for (int k = 0; k < K; ++k) line[k] += read(row, col, k) - mean[k];
    for (int k = 0; k < K; ++k) total[k] += line[k];
  }
  for (int k = 0; k < K; ++k) mean[k] += total[k] / count;
  for (int64_t row = 0; row < tile.rows; ++row) {
    vf line[K] = {};
    for (int64_t col = 0; col < tile.cols; ++col)
      for (int k = 0; k < K; ++k) {
        const vf d = read(row, col, k) - mean[k];
        rest[k] += d;
        line[k] += d * d;
      }
    for (int k = 0; k < K; ++k) squares[k] += line[k];
  }
  for (int k = 0; k < K; ++k) {
    const vf m2 = squares[k] - rest[k] * rest[k] / count;
    store_partial(tile.mean + c + k * kWidth, mean[k], lanes);
    store_partial(tile.m2 + c + k * kWidth, m2 > 0.0f ? m2 : vf{}, lanes);
  }
}

template <class T>
void tile_stats(const ConvTile& tile) {
  if (tile.lanes == kStrip) return vector_stats<T, kStripVectors>(tile, 0, kWidth);
  for (int64_t c = 0; c < tile.lanes; c += kWidth)
    vector_stats<T, 1>(tile, c, static_cast<int>(tile.lanes - c < kWidth ? tile.lanes - c : kWidth));
}

// T: type of out and residual.
template <class Dot, class T, int V>
void strip_of(const ConvTile& tile) {
  typename Dot::Sum sum[kGroup * V];
  const char* position[kGroup][2];
  T* out[kGroup];
  const int last = static_cast<int>(tile.lanes - (V - 1) * kWidth);  // channels in the last vector
  const int64_t residual = tile.residual ? tile.residual - tile.out : 0;
  int64_t row = 0, col = 0;
  for (int64_t left = tile.rows * tile.cols; left > 0;) {
    const int count = static_cast<int>(left < kGroup ? left : kGroup);
    for (int p = 0; p < count; ++p) {
      for (int s = 0; s < tile.segments; ++s)
        position[p][s] = tile.segment[s].data + row * tile.segment[s].row + col * tile.segment[s].col;
      out[p] = reinterpret_cast<T*>(tile.out + row * tile.out_row + col * tile.out_col);
      if (++col == tile.cols) col = 0, ++row;
    }
    sums<Dot, V>(tile, count, position, sum);
    for (int p = 0; p < count; ++p)
      for (int v = 0; v < V; ++v) {
        vf y = Dot::finish(tile, sum[p * V + v], v) + load(tile.base + v * kWidth);
        T* target = out[p] + v * kWidth;
        const T* added = reinterpret_cast<const T*>(reinterpret_cast<const char*>(target) + residual);
        if (v < V - 1 || last == kWidth) {
          if (tile.residual) y += load(added);
          store(target, y);
        } else {
          if (tile.residual) y += load_partial(added, last);
          store_partial(target, y, last);
        }
      }
    left -= count;
  }
  if (tile.mean) tile_stats<T>(tile);
}

template <class Dot, class T>
void strip(const ConvTile& tile) {
  switch ((tile.lanes + kWidth - 1) / kWidth) {
    case 1: return strip_of<Dot, T, 1>(tile);
    case 2: return strip_of<Dot, T, 2>(tile);
#if defined(__AVX512F__)
    case 3: return strip_of<Dot, T, 3>(tile);
    default: return strip_of<Dot, T, 4>(tile);
#endif
  }
}

}  // namespace IDM_ISA
}  // namespace idm
