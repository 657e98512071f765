// The vector code of group_norm_silu; compiled once per instruction set.
#include "common/simd.h"
#include "common/vector_math.h"
#include "group_norm_silu/group_norm_silu.h"

namespace idm {
namespace IDM_ISA {
namespace {

// A step takes this many rows of a pair of vectors. More rows to a step would leave the lines of a row half read for
// longer than the hardware's prefetch follows: with 16, a tensor beyond the second cache took twice as long.
#if defined(__AVX512F__)
constexpr int kTogether = 4;  // 8 of 32 registers
#else
constexpr int kTogether = 1;
#endif

constexpr int64_t kAhead = 16 * 1024;  // bytes; as for the statistics, the hardware's own prefetch is not enough

struct Coefficients {
  vf centre, gain, offset;
};

// Puts the coefficients of each pair of vectors into its order, and where the result is stored as bf16, which takes a
// cheaper SiLU, multiplies that one's factor -log2(e) into gain and offset.
template <class T>
void arrange(float* table, int64_t channels, int64_t row_stride, bool silu) {
  const float factor = silu && kIsBf16<T> ? -1.44269504f : 1.0f;
  for (int row = 0; row < 3; ++row, table += row_stride) {
    const vf by = splat(row ? factor : 1.0f);
    int64_t c = 0;
    for (; c + 2 * kWidth <= channels; c += 2 * kWidth) {
      vf a, b;
      load_pair_as<T>(table + c, &a, &b);
      store(table + c, a * by);
      store(table + c + kWidth, b * by);
    }
    for (; c < channels; ++c) table[c] *= by[0];
  }
}

// K vectors of a row, or of several, in place; those with an odd index take the second coefficients.
template <class T, bool kSilu, int K>
inline void finish(vf* v, const Coefficients& even, const Coefficients& odd) {
#pragma GCC unroll 8
  for (int k = 0; k < K; ++k) v[k] -= k % 2 ? odd.centre : even.centre;
#pragma GCC unroll 8
  for (int k = 0; k < K; ++k) v[k] = v[k] * (k % 2 ? odd.gain : even.gain) + (k % 2 ? odd.offset : even.offset);
  if constexpr (kSilu && kIsBf16<T>)
    silu_coarse_of_scaled<K>(v);
  else if constexpr (kSilu)
    for (int k = 0; k < K; ++k) v[k] = silu<false>(v[k]);
}

template <class T, bool kSilu, bool kStream, int kCount>
inline void step(const T* x, T* out, int64_t channels, int64_t out_stride, const Coefficients& a,
                 const Coefficients& b) {
  vf v[2 * kCount];
#pragma GCC unroll 4
  for (int k = 0; k < kCount; ++k) load_pair(x + k * channels, v + 2 * k, v + 2 * k + 1);
  if constexpr (kStream)
    for (int k = 0; k < kCount; ++k) __builtin_prefetch(reinterpret_cast<const char*>(x + k * channels) + kAhead);
  finish<T, kSilu, 2 * kCount>(v, a, b);
#pragma GCC unroll 4
  for (int k = 0; k < kCount; ++k) {
    if constexpr (kStream)
      stream_pair(out + k * out_stride, v[2 * k], v[2 * k + 1]);
    else
      store_pair(out + k * out_stride, v[2 * k], v[2 * k + 1]);
  }
}

template <class T, bool kSilu, bool kStream>
void apply_rows(const T* x, T* out, int64_t rows, int64_t channels, int64_t out_stride, const float* table,
                int64_t row_stride) {
  const float *centre = table, *gain = table + row_stride, *offset = gain + row_stride;
  for (int64_t first = 0; first < rows; first += kTogether, x += kTogether * channels, out += kTogether * out_stride) {
    const int64_t n = rows - first < kTogether ? rows - first : kTogether;
    int64_t c = 0;
    for (; c + 2 * kWidth <= channels; c += 2 * kWidth) {
      const Coefficients a{load(centre + c), load(gain + c), load(offset + c)};
      const Coefficients b{load(centre + c + kWidth), load(gain + c + kWidth), load(offset + c + kWidth)};
      if (n == kTogether)
        step<T, kSilu, kStream, kTogether>(x + c, out + c, channels, out_stride, a, b);
      else
        for (int64_t r = 0; r < n; ++r)
          step<T, kSilu, kStream, 1>(x + c + r * channels, out + c + r * out_stride, channels, out_stride, a, b);
    }
    for (; c < channels; c += kWidth) {
      const int count = channels - c < kWidth ? static_cast<int>(channels - c) : kWidth;
      const Coefficients a{load_partial(centre + c, count), load_partial(gain + c, count),
                           load_partial(offset + c, count)};
      for (int64_t r = 0; r < n; ++r) {
        const T* source = x + c + r * channels;
        T* target = out + c + r * out_stride;
        vf v = count == kWidth ? load(source) : load_partial(source, count);
        finish<T, kSilu, 1>(&v, a, a);
        if (count == kWidth)
          store(target, v);
        else
          store_partial(target, v, count);
      }
    }
  }
}

template <class T, bool kSilu>
void apply_as(const T* x, T* out, int64_t rows, int64_t channels, int64_t out_stride, const float* coefficients,
              int64_t row_stride, bool stream) {
  const bool lines = (reinterpret_cast<uintptr_t>(out) | static_cast<uintptr_t>(out_stride) * sizeof(T)) % 64 == 0;
  if (!stream || !lines) return apply_rows<T, kSilu, false>(x, out, rows, channels, out_stride, coefficients, row_stride);
  apply_rows<T, kSilu, true>(x, out, rows, channels, out_stride, coefficients, row_stride);
  stream_done();
}

template <class T>
void apply(const char* x, char* out, int64_t rows, int64_t channels, int64_t out_stride, const float* coefficients,
           int64_t row_stride, bool silu, bool stream) {
  const T* source = reinterpret_cast<const T*>(x);
  T* target = reinterpret_cast<T*>(out);
  if (silu)
    apply_as<T, true>(source, target, rows, channels, out_stride, coefficients, row_stride, stream);
  else
    apply_as<T, false>(source, target, rows, channels, out_stride, coefficients, row_stride, stream);
}

}  // namespace

extern const GroupNormKernels kGroupNormKernels = {{arrange<float>, arrange<bf16>, arrange<fp16>},
                                                  {apply<float>, apply<bf16>, apply<fp16>}};

}  // namespace IDM_ISA
}  // namespace idm
