// Philox 4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011) on vectors of counters, and
// the normals that every backend draws from it:
//
//   key = (seed low, seed high), counter = (i low, i high, step + 1, 0), i = element / 4
//   words -> u = (word >> 8) * 2^-24 + 2^-25 -> Box-Muller: (w0, w1) -> (r cos, r sin), (w2, w3) -> (r cos, r sin)
//
// where element = (h * W + w) * C + c counts within one image, and lane element % 4 picks the normal.
#pragma once

#include "common/vector_math.h"

namespace idm {
namespace IDM_ISA {

struct PhiloxStream {
  uint64_t seed;
  uint32_t word2;  // step + 1
};

#if defined(__AVX512F__)
inline vq multiply32(vq a, uint32_t m) {
  return bits<vq>(_mm512_mul_epu32(bits<__m512i>(a), _mm512_set1_epi64(static_cast<int64_t>(m))));
}
#elif defined(__AVX2__)
inline vq multiply32(vq a, uint32_t m) {
  return bits<vq>(_mm256_mul_epu32(bits<__m256i>(a), _mm256_set1_epi64x(static_cast<int64_t>(m))));
}
#else
inline vq multiply32(vq a, uint32_t m) { return (a & 0xffffffffu) * m; }
#endif

// Every 64-bit lane holds one counter's words, of which only the low halves count; the high halves carry leftovers.
inline void philox_lanes(vq counter, const PhiloxStream& stream, vq word[4]) {
  vq c0 = counter, c1 = counter >> 32, c2 = vq{} + stream.word2, c3 = {};
  uint32_t k0 = static_cast<uint32_t>(stream.seed), k1 = static_cast<uint32_t>(stream.seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const vq p0 = multiply32(c0, 0xD2511F53u), p1 = multiply32(c2, 0xCD9E8D57u);
    c0 = (p1 >> 32) ^ c1 ^ k0;
    c2 = (p0 >> 32) ^ c3 ^ k1;
    c1 = p1;
    c3 = p0;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  word[0] = c0, word[1] = c1, word[2] = c2, word[3] = c3;
}

// The words of counters first .. first + kWidth - 1: even counters run in one vector, odd ones in the other.
inline void philox(uint64_t first, const PhiloxStream& stream, vu word[4]) {
  vq even = vq{} + first;
  for (int j = 0; j < kWidth / 2; ++j) even[j] += 2 * static_cast<uint64_t>(j);
  vq a[4], b[4];
  philox_lanes(even, stream, a);
  philox_lanes(even + 1, stream, b);
  for (int i = 0; i < 4; ++i) word[i] = bits<vu>((a[i] & 0xffffffffu) | (b[i] << 32));
}

inline vf uniform(vu word) {
  return __builtin_convertvector(bits<vi>(word >> 8), vf) * 0x1p-24f + 0x1p-25f;  // in (0, 1]
}

inline void box_muller(vu w0, vu w1, vf* first, vf* second) {
  const vf r = vsqrt(log_normal(uniform(w0)) * -2.0f);
  vf c, s;
  cos_sin_turns(uniform(w1), &c, &s);
  *first = r * c;
  *second = r * s;
}

// a0 b0 a1 b1 ... from the low halves, and from the high halves.
#if defined(__AVX512F__)
#define IDM_ZIP_LOW 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23
#define IDM_ZIP_HIGH 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31
#elif defined(__AVX2__)
#define IDM_ZIP_LOW 0, 8, 1, 9, 2, 10, 3, 11
#define IDM_ZIP_HIGH 4, 12, 5, 13, 6, 14, 7, 15
#else
#define IDM_ZIP_LOW 0, 4, 1, 5
#define IDM_ZIP_HIGH 2, 6, 3, 7
#endif
#if defined(__clang__)
inline vf zip_low(vf a, vf b) { return __builtin_shufflevector(a, b, IDM_ZIP_LOW); }
inline vf zip_high(vf a, vf b) { return __builtin_shufflevector(a, b, IDM_ZIP_HIGH); }
#else  // GCC has clang's name from version 12 on only
inline vf zip_low(vf a, vf b) { return __builtin_shuffle(a, b, vi{IDM_ZIP_LOW}); }
inline vf zip_high(vf a, vf b) { return __builtin_shuffle(a, b, vi{IDM_ZIP_HIGH}); }
#endif
#undef IDM_ZIP_LOW
#undef IDM_ZIP_HIGH

// The 4 * kWidth normals of elements 4 * first ..., in element order.
inline void normals(uint64_t first, const PhiloxStream& stream, vf out[4]) {
  vu w[4];
  philox(first, stream, w);
  vf n0, n1, n2, n3;
  box_muller(w[0], w[1], &n0, &n1);
  box_muller(w[2], w[3], &n2, &n3);
  const vf low02 = zip_low(n0, n2), low13 = zip_low(n1, n3), high02 = zip_high(n0, n2), high13 = zip_high(n1, n3);
  out[0] = zip_low(low02, low13);
  out[1] = zip_high(low02, low13);
  out[2] = zip_low(high02, high13);
  out[3] = zip_high(high02, high13);
}

}  // namespace IDM_ISA
}  // namespace idm
