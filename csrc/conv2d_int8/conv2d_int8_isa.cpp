// The vector code of conv2d_int8; compiled once per instruction set.
#include "common/simd.h"
#include "conv2d/prologue.h"
#include "conv2d/tile.h"
#include "conv2d_int8/conv2d_int8.h"

namespace idm {
namespace IDM_ISA {
namespace {

typedef uint8_t vb __attribute__((vector_size(kWidth)));

// sum += the four products of an activation's bytes (0..255) and a weight's bytes (-127..127), exact in int32.
#if defined(__AVX512VNNI__)
struct Word {
  __m512i bytes;
};
inline Word weight_word(__m512i v) { return {v}; }
inline Word activation_word(int32_t v) { return {_mm512_set1_epi32(v)}; }
inline vi multiply(vi sum, Word a, Word w) {
  return bits<vi>(_mm512_dpbusd_epi32(bits<__m512i>(sum), a.bytes, w.bytes));
}
#elif defined(__AVX512BW__)
struct Word {  // bytes 0 and 2, bytes 1 and 3, as 16-bit numbers
  __m512i even, odd;
};
inline Word weight_word(__m512i v) { return {_mm512_srai_epi16(_mm512_slli_epi16(v, 8), 8), _mm512_srai_epi16(v, 8)}; }
inline Word activation_word(int32_t v) {
  return {_mm512_set1_epi32(v & 0x00ff00ff), _mm512_set1_epi32((v >> 8) & 0x00ff00ff)};
}
inline vi multiply(vi sum, Word a, Word w) {
  return sum + bits<vi>(_mm512_madd_epi16(a.even, w.even)) + bits<vi>(_mm512_madd_epi16(a.odd, w.odd));
}
#elif defined(__AVX2__)
struct Word {
  __m256i even, odd;
};
inline Word weight_word(__m256i v) { return {_mm256_srai_epi16(_mm256_slli_epi16(v, 8), 8), _mm256_srai_epi16(v, 8)}; }
inline Word activation_word(int32_t v) {
  return {_mm256_set1_epi32(v & 0x00ff00ff), _mm256_set1_epi32((v >> 8) & 0x00ff00ff)};
}
inline vi multiply(vi sum, Word a, Word w) {
  return sum + bits<vi>(_mm256_madd_epi16(a.even, w.even)) + bits<vi>(_mm256_madd_epi16(a.odd, w.odd));
}
#else
struct Word {
  vi byte[4];
};
inline Word weight_word(vi v) { return {{v << 24 >> 24, v << 16 >> 24, v << 8 >> 24, v >> 24}}; }
inline Word activation_word(int32_t v) {
  const vi all = v - vi{};
  return {{all & 255, (all >> 8) & 255, (all >> 16) & 255, (all >> 24) & 255}};
}
inline vi multiply(vi sum, const Word& a, const Word& w) {
  for (int i = 0; i < 4; ++i) sum += a.byte[i] * w.byte[i];
  return sum;
}
#endif

struct Int8Dot {
  typedef vi Sum;
  static constexpr int64_t kChunk = 0;
  static vi start(const ConvTile& tile, int v) {
    vi sum;
    std::memcpy(&sum, static_cast<const int32_t*>(tile.start) + v * kWidth, sizeof sum);
    return sum;
  }
  static Word weights(const char* p) {
#if defined(__AVX512F__)
    return weight_word(_mm512_loadu_si512(p));
#elif defined(__AVX2__)
    return weight_word(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#else
    vi v;
    std::memcpy(&v, p, sizeof v);
    return weight_word(v);
#endif
  }
  static Word broadcast(const char* p) {
    int32_t word;
    std::memcpy(&word, p, 4);
    return activation_word(word);
  }
  static vi dot(vi sum, Word a, Word w) { return multiply(sum, a, w); }
  static vf finish(const ConvTile& tile, vi sum, int v) {
    return __builtin_convertvector(sum, vf) * load(tile.scale + v * kWidth);
  }
};

// ---- prologue ----------------------------------------------------------------------------------------------------

// Adding 1.5 * 2^23 rounds to the nearest integer, which then is the low bits; NaN becomes 0.
inline vb quantised(vf a, float inverse_step, float zero_point) {
  vf v = a * inverse_step + zero_point;
  v = v > 0.0f ? v : vf{};
  v = v < 255.0f ? v : splat(255.0f);
  return __builtin_convertvector(bits<vu>(v + 12582912.0f) & 255u, vb);
}

template <class T, Prologue kind>
void prepare_pixels(const ConvPrepare& p, const T* x, int64_t channels, int64_t first, char* target) {
  const int64_t all = p.channels[0] + p.channels[1];
  const bool used = kind != Prologue::kNone;  // nothing is added to a null pointer
  const float* centre = used ? p.coefficients + first : nullptr;
  const float *gain = used ? centre + all : nullptr, *offset = used ? gain + all : nullptr;
  const int64_t whole = channels - channels % kWidth;
  const int lanes = static_cast<int>(channels - whole);
  const auto full = [&](const float* v, int64_t c) { return kind == Prologue::kNone ? vf{} : load(v + c); };
  const auto part = [&](const float* v) { return kind == Prologue::kNone ? vf{} : load_partial(v + whole, lanes); };
  const auto put = [&](char* to, vf v, size_t count) {
    const vb bytes = quantised(v, p.inverse_step, p.zero_point);
    std::memcpy(to, &bytes, count);
  };
  for (int64_t i = 0; i < p.width; ++i, x += channels, target += p.pitch * 4) {
    for (int64_t c = 0; c < whole; c += kWidth)
      put(target + c, prologue<true, kind>(load(x + c), full(centre, c), full(gain, c), full(offset, c)), kWidth);
    if (lanes)
      put(target + whole, prologue<true, kind>(load_partial(x + whole, lanes), part(centre), part(gain), part(offset)),
          static_cast<size_t>(lanes));
  }
}

template <class T>
void prepare(const ConvPrepare& p) {
  const int64_t channels = p.channels[0] + p.channels[1], pixel = p.pitch * 4, line = (p.width + 2 * p.halo) * pixel;
  const int zero = static_cast<int>(p.zero_point);
  const size_t halo_bytes = static_cast<size_t>(p.halo * pixel);
  char* target = p.target;
  for (int64_t r = 0; r < p.rows; ++r, target += line) {
    const int64_t row = p.first_row + r;
    if (row < 0 || row >= p.height) {
      std::memset(target, zero, static_cast<size_t>(line));
      continue;
    }
    char* inner = target + p.halo * pixel;
    std::memset(target, zero, halo_bytes);
    std::memset(inner + p.width * pixel, zero, halo_bytes);
    if (pixel > channels)
      for (int64_t i = 0; i < p.width; ++i)
        std::memset(inner + i * pixel + channels, 0, static_cast<size_t>(pixel - channels));
    int64_t first = 0;
    for (int s = 0; s < 2; ++s) {
      const int64_t count = p.channels[s];
      if (count == 0) continue;
      const T* x = reinterpret_cast<const T*>(p.source[s]) + row * p.width * count;
      if (!p.coefficients)
        prepare_pixels<T, Prologue::kNone>(p, x, count, 0, inner + first);
      else if (p.silu)
        prepare_pixels<T, Prologue::kSilu>(p, x, count, first, inner + first);
      else
        prepare_pixels<T, Prologue::kAffine>(p, x, count, first, inner + first);
      first += count;
    }
  }
}

// ---- weights -----------------------------------------------------------------------------------------------------

void pack(const int8_t* weight, int64_t cout, int64_t taps, int64_t channels, int8_t* packed, int32_t* sums) {
  for (int64_t first = 0; first < cout; first += kStrip) {
    const int64_t left = cout - first < kStrip ? cout - first : kStrip;
    const int64_t padded = (left + kWidth - 1) / kWidth * kWidth;
    for (int64_t lane = 0; lane < padded; ++lane) sums[first + lane] = 0;
    for (int64_t tap = 0; tap < taps; ++tap)
      for (int64_t c = 0; c < channels; c += 4)
        for (int64_t lane = 0; lane < padded; ++lane)
          for (int64_t i = 0; i < 4; ++i, ++packed) {
            const bool real = lane < left && c + i < channels;
            *packed = real ? weight[((first + lane) * taps + tap) * channels + c + i] : static_cast<int8_t>(0);
            sums[first + lane] += *packed;
          }
  }
}

}  // namespace

extern const Conv2dInt8Kernels kConv2dInt8Kernels = {
    kWidth,
    kStrip,
    {prepare<float>, prepare<bf16>, prepare<fp16>},
    {strip<Int8Dot, float>, strip<Int8Dot, bf16>, strip<Int8Dot, fp16>},
    pack};

}  // namespace IDM_ISA
}  // namespace idm
