// The noise of philox.h for one thread: the four normals of one counter. The words are the same bits, the normals the
// same to rounding; the fits are those of vector_math.h (the hardware's fast logarithm is off by 2e-7 absolutely, which
// near u = 1 is an error of 7e-4 in the normal).
#pragma once

#include "common/cuda.h"

namespace idm {

struct PhiloxWords {
  uint32_t word[4];
};

// Philox 4x32-10 with key = seed and counter = (i low, i high, word2, 0).
__device__ __forceinline__ PhiloxWords philox_words(uint64_t i, uint64_t seed, uint32_t word2) {
  uint32_t c0 = static_cast<uint32_t>(i), c1 = static_cast<uint32_t>(i >> 32), c2 = word2, c3 = 0;
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
#pragma unroll
  for (int round = 0; round < 10; ++round) {
    const uint32_t high0 = __umulhi(0xD2511F53u, c0), low0 = 0xD2511F53u * c0;
    const uint32_t high1 = __umulhi(0xCD9E8D57u, c2), low1 = 0xCD9E8D57u * c2;
    c0 = high1 ^ c1 ^ k0;
    c2 = high0 ^ c3 ^ k1;
    c1 = low1;
    c3 = low0;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

__device__ __forceinline__ float philox_uniform(uint32_t word) {
  return static_cast<float>(word >> 8) * 0x1p-24f + 0x1p-25f;  // in (0, 1]
}

// ln(u) for normal u > 0: u = 2^k (1 + t), 1 + t in [sqrt(1/2), sqrt(2)).
__device__ __forceinline__ float log_normal(float u) {
  const int pattern = __float_as_int(u), k = (pattern - 0x3f3504f3) >> 23;
  const float t = __int_as_float(pattern - k * (1 << 23)) - 1.0f;
  float q = 0.127989416f - t * 0.0830548986f;
  q = 0.141902317f + t * (-0.129434029f + t * q);
  q = 0.200018801f + t * (-0.166434891f + t * q);
  q = 0.333333265f + t * (-0.250002808f + t * q);
  return t + (t * t * (t * q - 0.5f) + static_cast<float>(k) * 0.693147181f);
}

__device__ __forceinline__ void box_muller(uint32_t w0, uint32_t w1, float* first, float* second) {
  const float radius = __fsqrt_rn(log_normal(philox_uniform(w0)) * -2.0f), u = philox_uniform(w1);
  const int quarter = static_cast<int>(u * 4.0f + 0.5f);  // the quarter turn is split off exactly
  const float f = u - static_cast<float>(quarter) * 0.25f, z = f * f;
  const float sine = f * (6.28318529f + z * (-41.3416615f + z * (81.5923536f + z * -75.3935628f)));
  const float cosine = 0.999999967f + z * (-19.7391466f + z * (64.9203064f + z * -83.552591f));
  const bool odd = quarter & 1;
  const float c = odd ? sine : cosine, s = odd ? cosine : sine;
  *first = radius * ((quarter + 1) & 2 ? -c : c);
  *second = radius * (quarter & 2 ? -s : s);
}

// The normals of elements 4 i ... 4 i + 3.
__device__ __forceinline__ float4 philox_normals(uint64_t i, uint64_t seed, uint32_t word2) {
  const PhiloxWords w = philox_words(i, seed, word2);
  float4 n;
  box_muller(w.word[0], w.word[1], &n.x, &n.y);
  box_muller(w.word[2], w.word[3], &n.z, &n.w);
  return n;
}

}  // namespace idm
