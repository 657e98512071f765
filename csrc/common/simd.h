// One vector type per instruction set: 16, 8 or 4 floats. Included only by *_isa.cpp files, which are compiled once per
// set with IDM_ISA naming it. Everything lies in a namespace of that name, and no standard template is used there, so
// that the linker can never let code compiled for AVX-512 run on a machine without it.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__SSE2__)
#include <immintrin.h>
#endif

#include "common/dtype.h"

namespace idm {
namespace IDM_ISA {

#if defined(__AVX512F__)
constexpr int kWidth = 16;
#elif defined(__AVX2__)
constexpr int kWidth = 8;
#else
constexpr int kWidth = 4;
#endif

typedef float vf __attribute__((vector_size(kWidth * 4)));
typedef int32_t vi __attribute__((vector_size(kWidth * 4)));
typedef uint32_t vu __attribute__((vector_size(kWidth * 4)));
typedef uint64_t vq __attribute__((vector_size(kWidth * 4)));  // kWidth / 2 lanes
typedef uint16_t vh __attribute__((vector_size(kWidth * 2)));  // kWidth lanes of 16 bits

template <class To, class From>
inline To bits(From v) {
  static_assert(sizeof(To) == sizeof(From), "a bit cast keeps the size");
  return reinterpret_cast<To>(v);
}

inline vf splat(float value) { return value - vf{}; }

// ---- loads: storage type -> float32 ----------------------------------------------------------------------------
inline vf load(const float* p) {
  vf v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

// Widening is written out because GCC 12 makes five instructions of __builtin_convertvector.
inline vu load_words(const void* p) {
#if defined(__AVX512F__)
  return bits<vu>(_mm512_cvtepu16_epi32(_mm256_loadu_si256(static_cast<const __m256i*>(p))));
#elif defined(__AVX2__)
  return bits<vu>(_mm256_cvtepu16_epi32(_mm_loadu_si128(static_cast<const __m128i*>(p))));
#else
  vh h;
  std::memcpy(&h, p, sizeof h);
  return __builtin_convertvector(h, vu);
#endif
}

inline vf load(const bf16* p) { return bits<vf>(load_words(p) << 16); }

#if defined(__AVX512F__)
inline vf load(const fp16* p) {
  return bits<vf>(_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))));
}
#elif defined(__AVX2__)
inline vf load(const fp16* p) { return bits<vf>(_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))); }
#else
// Shift exponent and mantissa into place, then multiply by 2^112: exact for normal and subnormal numbers alike.
inline vf load(const fp16* p) {
  const vu u = load_words(p);
  const vu magnitude = (u & 0x7fff) << 13;
  const vf finite = bits<vf>(magnitude) * 0x1p112f;
  const vu out = magnitude >= 0x0f800000u ? magnitude | 0x7f800000u : bits<vu>(finite);
  return bits<vf>(out | (u & 0x8000) << 16);
}
#endif

// ---- stores: float32 -> storage type, round to nearest even, NaN stays NaN -------------------------------------
inline void store(float* p, vf v) { std::memcpy(p, &v, sizeof v); }

#if defined(__AVX512BF16__)
inline void store(bf16* p, vf v) {  // this instruction alone writes zero for subnormal numbers
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), bits<__m256i>(_mm512_cvtneps_pbh(bits<__m512>(v))));
}
#else
inline void store(bf16* p, vf v) {
  const vu u = bits<vu>(v);
  const vu rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
  const vh h = __builtin_convertvector(v == v ? rounded : (u >> 16) | 0x40, vh);
  std::memcpy(p, &h, sizeof h);
}
#endif

#if defined(__AVX512F__)
inline void store(fp16* p, vf v) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(bits<__m512>(v), _MM_FROUND_TO_NEAREST_INT));
}
#elif defined(__AVX2__)
inline void store(fp16* p, vf v) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(bits<__m256>(v), _MM_FROUND_TO_NEAREST_INT));
}
#else
inline void store(fp16* p, vf v) {
  const vu u = bits<vu>(v), sign = (u >> 16) & 0x8000, magnitude = u & 0x7fffffff;
  // Subnormals: adding 0.5 puts the result's last bit at 2^-24, where half precision has it, rounded by the adder.
  const vu subnormal = bits<vu>(bits<vf>(magnitude) + 0.5f) - 0x3f000000u;
  const vu normal = (magnitude + 0xc8000fffu + ((magnitude >> 13) & 1)) >> 13;
  vu out = magnitude < 0x38800000u ? subnormal : normal;
  out = magnitude >= 0x477ff000u ? vu{} + 0x7c00u : out;
  out = magnitude > 0x7f800000u ? vu{} + 0x7e00u : out;
  const vh h = __builtin_convertvector(out | sign, vh);
  std::memcpy(p, &h, sizeof h);
}
#endif

// ---- the last, partial vector of a row: `count` < kWidth elements, the rest reads as zero ----------------------
template <class T>
inline vf load_partial(const T* p, int count) {
  T lanes[kWidth] = {};
  std::memcpy(lanes, p, static_cast<size_t>(count) * sizeof(T));
  return load(lanes);
}

template <class T>
inline void store_partial(T* p, vf v, int count) {
  T lanes[kWidth];
  store(lanes, v);
  std::memcpy(p, lanes, static_cast<size_t>(count) * sizeof(T));
}

// ---- two vectors at once -----------------------------------------------------------------------------------------
// For bf16 the first vector gets elements 0, 2, 4 ... and the second 1, 3, 5 ...: a shift and a mask, where widening
// costs two loads and two shuffles, and on the way back one narrowing for both. Other types keep the order.

// Which of 2 * kWidth elements lies in lane i of the pair.
template <class T>
constexpr int element_of_lane(int i) {
  return !kIsBf16<T> ? i : i < kWidth ? 2 * i : 2 * (i - kWidth) + 1;
}

template <class T>
inline void load_pair(const T* p, vf* a, vf* b) {
  *a = load(p);
  *b = load(p + kWidth);
}
inline void load_pair(const bf16* p, vf* even, vf* odd) {
  vu words;
  std::memcpy(&words, p, sizeof words);
  *even = bits<vf>(words << 16);
  *odd = bits<vf>(words & 0xffff0000u);
}

// float32 values of 2 * kWidth channels in the order in which load_pair gives those of a T.
template <class T>
inline void load_pair_as(const float* p, vf* a, vf* b) {
  const vf low = load(p), high = load(p + kWidth);
  *a = low;
  *b = high;
  if constexpr (kIsBf16<T>) {
#if defined(__AVX512F__)
    *a = __builtin_shufflevector(low, high, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    *b = __builtin_shufflevector(low, high, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
#elif defined(__AVX2__)
    *a = __builtin_shufflevector(low, high, 0, 2, 4, 6, 8, 10, 12, 14);
    *b = __builtin_shufflevector(low, high, 1, 3, 5, 7, 9, 11, 13, 15);
#else
    *a = __builtin_shufflevector(low, high, 0, 2, 4, 6);
    *b = __builtin_shufflevector(low, high, 1, 3, 5, 7);
#endif
  }
}

template <class T>
inline void store_pair(T* p, vf a, vf b) {
  store(p, a);
  store(p + kWidth, b);
}
#if defined(__AVX512BF16__)
inline void store_pair(bf16* p, vf even, vf odd) {
  static const uint16_t kOrder[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                      8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  const __m512i both = bits<__m512i>(_mm512_cvtne2ps_pbh(bits<__m512>(odd), bits<__m512>(even)));
  _mm512_storeu_si512(p, _mm512_permutexvar_epi16(_mm512_loadu_si512(kOrder), both));
}
#else
inline vu round_to_bf16(vf v) {  // in the upper half of each lane
  const vu u = bits<vu>(v);
  return v == v ? u + 0x7fff + ((u >> 16) & 1) : u | 0x400000;
}
inline void store_pair(bf16* p, vf even, vf odd) {
  const vu words = (round_to_bf16(even) >> 16) | (round_to_bf16(odd) & 0xffff0000u);
  std::memcpy(p, &words, sizeof words);
}
#endif

// Stores past the caches, for what is too large to stay there or is not read soon; lines of 64 bytes are written whole, one
// after the other. Whoever streams ends with stream_done(), or another thread may read what was there before.
inline void stream(float* p, vf v) {
#if defined(__AVX512F__)
  _mm512_stream_ps(p, bits<__m512>(v));
#elif defined(__AVX2__)
  _mm256_stream_ps(p, bits<__m256>(v));
#elif defined(__SSE2__)
  _mm_stream_ps(p, bits<__m128>(v));
#else
  store(p, v);
#endif
}

template <class T>
inline void stream_pair(T* p, vf a, vf b) {
  constexpr int kWords = 2 * kWidth * sizeof(T) / sizeof(vf);
  T lanes[2 * kWidth];
  vf words[kWords];
  store_pair(lanes, a, b);
  std::memcpy(words, lanes, sizeof words);
  for (int i = 0; i < kWords; ++i) stream(reinterpret_cast<float*>(p) + i * kWidth, words[i]);
}

inline void stream_done() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

}  // namespace IDM_ISA
}  // namespace idm
