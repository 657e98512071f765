// Products of a few rows with a packed panel, held in registers: what attention and vq_nearest are made of.
//
// Everything is counted in words of 32 bits. A word is one float32 (Float) or two neighbouring bf16 of the summed
// dimension (Pairs, where the machine has the dot product of them). Only for *_isa.cpp files, like simd.h.
#pragma once

#include "common/simd.h"

namespace idm {
namespace IDM_ISA {

struct Float {
  static constexpr int kPerWord = 1;
  static vf multiply_add(vu a, vu b, vf sum) { return bits<vf>(a) * bits<vf>(b) + sum; }
};

#if defined(__AVX512BF16__)
struct Pairs {
  static constexpr int kPerWord = 2;
  static vf multiply_add(vu a, vu b, vf sum) {
    return bits<vf>(_mm512_dpbf16_ps(bits<__m512>(sum), bits<__m512bh>(a), bits<__m512bh>(b)));
  }
};
#endif

// How many rows go with a panel of N vectors so that sums, panel and one factor fill the registers (32 or 16 of them).
#if defined(__AVX512F__)
constexpr int kMaxVectors = 4;
constexpr int kTileRows[kMaxVectors + 1] = {0, 16, 12, 8, 6};
#else
constexpr int kMaxVectors = 2;
constexpr int kTileRows[kMaxVectors + 1] = {0, 8, 6};
#endif
constexpr int64_t kPanel = kMaxVectors * kWidth;  // words across a full panel

inline vu load_u32(const uint32_t* p) {
  vu v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
inline void store_u32(uint32_t* p, vu v) { std::memcpy(p, &v, sizeof v); }

// One product: sums[row][lane] = keep[row] * sums[row][lane] + sum over `steps` of rows[row][step] * panel[step][lane].
struct Product {
  const uint32_t* rows;
  int64_t row_stride;  // words
  const uint32_t* panel;
  int64_t panel_stride;  // words
  int64_t steps;
  float* sums;
  int64_t sums_stride;
  const float* keep;  // null: the sums start at zero, or with `add` go on as they are
  bool add = false;
};

// Steps that one register sums up before it joins the others: a float32 sum of few terms has lost little, and that much
// of a panel stays in the nearest cache.
constexpr int64_t kSumSteps = 128;

template <class E, int M, int N>
inline void tile(const Product& p, int64_t row) {
  const uint32_t* a = p.rows + row * p.row_stride;
  const uint32_t* b = p.panel;
  float* c = p.sums + row * p.sums_stride;
  vf sum[M][N] = {};
  for (int64_t k = 0; k < p.steps; ++k, b += p.panel_stride) {
    vu right[N];
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) right[n] = load_u32(b + n * kWidth);
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m) {
      const vu left = a[m * p.row_stride + k] + vu{};
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) sum[m][n] = E::multiply_add(left, right[n], sum[m][n]);
    }
  }
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) {
      float* target = c + m * p.sums_stride + n * kWidth;
      const vf before = p.keep ? load(target) * p.keep[row + m] : p.add ? load(target) : vf{};
      store(target, before + sum[m][n]);
    }
}

template <class E, int M, int N>
inline void tile_of(int rows, const Product& p, int64_t row) {
  if constexpr (M > 0) {
    if (rows == M) return tile<E, M, N>(p, row);
    tile_of<E, M - 1, N>(rows, p, row);
  }
}

// `rows` rows in tiles of nearly equal height; the cut does not change a sum.
template <class E, int N>
void product_of(const Product& p, int64_t rows) {
  const int64_t tiles = (rows + kTileRows[N] - 1) / kTileRows[N];
  for (int64_t t = 0; t < tiles; ++t) {
    const int64_t first = rows * t / tiles;
    tile_of<E, kTileRows[N], N>(static_cast<int>(rows * (t + 1) / tiles - first), p, first);
  }
}

template <class E, int N = kMaxVectors>
inline void product_across(const Product& p, int64_t rows, int vectors) {
  if constexpr (N > 0) {
    if (vectors == N) return product_of<E, N>(p, rows);
    product_across<E, N - 1>(p, rows, vectors);
  }
}

template <class E>
void product(Product p, int64_t rows, int vectors) {
  for (int64_t left = p.steps; left > 0; left -= kSumSteps) {
    p.steps = left < kSumSteps ? left : kSumSteps;
    product_across<E>(p, rows, vectors);
    p.rows += kSumSteps;
    p.panel += kSumSteps * p.panel_stride;
    p.keep = nullptr;
    p.add = true;
  }
}

// ---- packing -----------------------------------------------------------------------------------------------------

inline vu interleave_low(vu a, vu b) {
#if defined(__AVX512F__)
  return __builtin_shufflevector(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
#elif defined(__AVX2__)
  return __builtin_shufflevector(a, b, 0, 8, 1, 9, 2, 10, 3, 11);
#else
  return __builtin_shufflevector(a, b, 0, 4, 1, 5);
#endif
}

inline vu interleave_high(vu a, vu b) {
#if defined(__AVX512F__)
  return __builtin_shufflevector(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
#elif defined(__AVX2__)
  return __builtin_shufflevector(a, b, 4, 12, 5, 13, 6, 14, 7, 15);
#else
  return __builtin_shufflevector(a, b, 2, 6, 3, 7);
#endif
}

// A square of words, turned over its diagonal: each round interleaves the lower half of the rows into the upper one.
inline void transpose(vu (&square)[kWidth]) {
  vu other[kWidth];
#pragma GCC unroll 4
  for (int round = 1; round < kWidth; round *= 2) {
#pragma GCC unroll 8
    for (int i = 0; i < kWidth / 2; ++i) {
      other[2 * i] = interleave_low(square[i], square[i + kWidth / 2]);
      other[2 * i + 1] = interleave_high(square[i], square[i + kWidth / 2]);
    }
#pragma GCC unroll 16
    for (int i = 0; i < kWidth; ++i) square[i] = other[i];
  }
}

inline int64_t words_of(int64_t elements, int per_word) { return (elements + per_word - 1) / per_word; }

// Words [word, word + kWidth) of a row of `elements` elements; what lies beyond the row is zero.
template <class E, class T>
inline vu row_words(const T* row, int64_t elements, int64_t word) {
  if constexpr (E::kPerWord == 2) {
    uint32_t words[kWidth] = {};
    const int64_t left = elements - 2 * word;
    if (left >= 2 * kWidth) return load_u32(reinterpret_cast<const uint32_t*>(row + 2 * word));
    std::memcpy(words, row + 2 * word, static_cast<size_t>(left < 0 ? 0 : left) * sizeof(T));
    return load_u32(words);
  } else {
    const int64_t left = elements - word;
    if (left >= kWidth) return bits<vu>(load(row + word));
    return left > 0 ? bits<vu>(load_partial(row + word, static_cast<int>(left))) : vu{};
  }
}

// Up to kPanel rows become the columns of a panel [words][kPanel]; columns beyond `rows` are zero.
template <class E, class T>
void pack_columns(const T* source, int64_t stride, int64_t rows, int64_t elements, uint32_t* panel) {
  const int64_t words = words_of(elements, E::kPerWord);
  for (int64_t column = 0; column < kPanel; column += kWidth)
    for (int64_t word = 0; word < words; word += kWidth) {
      vu square[kWidth];
      for (int i = 0; i < kWidth; ++i)
        square[i] = column + i < rows ? row_words<E>(source + (column + i) * stride, elements, word) : vu{};
      transpose(square);
      const int64_t count = words - word < kWidth ? words - word : kWidth;
      for (int64_t i = 0; i < count; ++i) store_u32(panel + (word + i) * kPanel + column, square[i]);
    }
}

}  // namespace IDM_ISA
}  // namespace idm
